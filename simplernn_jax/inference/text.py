"""Text in, text out: `generate` with a tokenizer around it."""

import codecs
from collections.abc import Callable, Sequence

import numpy as np

from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.inference.decode import generate
from simplernn_jax.models import LanguageModel

CONTEXT = 64
"""Ids kept to decode the next ones with: some tokenizers write a token to suit its neighbours."""


def generate_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    on_text: Callable[[list[str]], None] | None = None,
) -> list[str]:
    """Continues each prompt, as the beginning of a document, until its end or `max_new_tokens`.

    BOS stands before every prompt, as in training; an empty prompt is BOS alone. BOS, PAD and
    ids that the tokenizer does not know are never written.

    Args:
      model: the language model.
      tokenizer: the one it was trained with.
      prompts: one text or several.
      max_new_tokens, temperature, top_k, top_p, seed: as for `generate`.
      on_text: called as text comes, with the new characters of every row (whole ones only).

    Returns:
      The continuations, without the prompts, one per prompt.

    Raises:
      UserError: a text that the tokenizer cannot encode, or as for `generate`.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    vocab_size = model.config.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model {vocab_size}; "
            "use the tokenizer the model was trained with"
        )
    banned_ids = {tokenizer.bos_id, tokenizer.pad_id, *range(tokenizer.vocab_size, vocab_size)}
    banned_ids -= {tokenizer.eos_id}  # some vocabularies have one id for several purposes
    rows = [np.concatenate([[tokenizer.bos_id], tokenizer.encode(prompt)]) for prompt in prompts]
    streams = [TextStream(tokenizer, row) for row in rows]
    texts = [""] * len(rows)

    def take(pieces: list[str]) -> None:
        for index, piece in enumerate(pieces):
            texts[index] += piece
        if on_text is not None:
            on_text(pieces)

    generate(
        model,
        rows,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_id=tokenizer.eos_id,
        banned_ids=sorted(banned_ids),
        on_tokens=lambda new: take(
            [stream.feed(ids) for stream, ids in zip(streams, new, strict=True)]
        ),
    )
    take([stream.finish() for stream in streams])
    return texts


class TextStream:
    """Turns the ids of one row into text piece by piece and never cuts a character.

    Args:
      tokenizer: decodes the ids.
      context: [n] ids already written elsewhere, usually the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] | np.ndarray = ()) -> None:
        self._tokenizer = tokenizer
        self._remember([int(token) for token in context])

    def feed(self, ids: Sequence[int] | np.ndarray) -> str:
        """The characters that `ids` complete; an unfinished one waits for its other bytes."""
        self._ids += [int(token) for token in ids]
        text = self._text()[self._num_written :]
        self._num_written += len(text)
        if len(self._ids) > 2 * CONTEXT:
            self._remember(self._ids)
        return text

    def finish(self) -> str:
        """What is left of an unfinished character, as U+FFFD; otherwise an empty string."""
        return self._text(final=True)[self._num_written :]

    def _remember(self, ids: list[int]) -> None:
        self._ids = ids[-CONTEXT:]
        self._num_written = len(self._text())

    def _text(self, final: bool = False) -> str:
        """All of the remembered ids; without an unfinished character at its end, unless `final`."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return decoder.decode(self._tokenizer.decode_bytes(self._ids), final)
