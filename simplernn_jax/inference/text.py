"""Generation of text: `generate` between a tokenizer's encoding and decoding."""

import codecs
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from simplernn_jax.data.infilling import Infilling, heal
from simplernn_jax.data.tokenizer import Tokenizer, ids_without_text, token_bytes
from simplernn_jax.inference.arguments import check_model, checked_texts
from simplernn_jax.inference.decode import generate
from simplernn_jax.inference.sampling import keep_only
from simplernn_jax.inference.state import RECENT_TOKENS, DecoderState, check_state, fork_state
from simplernn_jax.models import LanguageModel


class Texts(list[str]):
    """Continuations, without their prompts, one per sequence."""

    def __init__(self, texts: Iterable[str], state: DecoderState) -> None:
        super().__init__(texts)
        self.state = state
        """State after the texts, from which `generate_text` continues."""


def generate_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str] | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    state: DecoderState | None = None,
    on_text: Callable[[list[str]], None] | None = None,
    lookup: bool = True,
    context: str = "",
) -> Texts:
    """Continue each prompt, as the beginning of a document, up to its end or `max_new_tokens`.

    BOS is put before every prompt, as in training; an empty prompt is BOS alone. BOS, PAD and ids
    that the tokenizer does not know are never generated.

    Continuing from `Texts.state` with the same settings gives the text of one longer call. A
    character that the first call left unfinished is given whole by the next one.

    Args:
      model: the language model.
      tokenizer: the one it was trained with.
      prompts: one text or several; None is an empty one. With `state`, text to append first,
        without BOS: one text is for every sequence, and an empty one appends nothing.
      max_new_tokens, temperature, top_k, top_p, seed: as for `generate`.
      state: sequences to continue, from an earlier call with the same model, loaded or forked.
      on_text: called with the new characters of every sequence (whole ones only) as they come.
      lookup: as for `generate`.
      context: text before `state`, of every sequence, in which `lookup` searches too.

    Returns:
      The continuations, a list, and the state after them as its attribute ``state``.

    Raises:
      UserError: not a text, a text that the tokenizer cannot encode, or as for `generate`.
    """
    check_model(model)
    if state is not None:
        check_state(model, state)
    vocab_size = model.config.vocab_size
    batch_size = 1 if state is None else len(state.position)
    ids = [tokenizer.encode(prompt) for prompt in checked_texts(prompts, batch_size)]
    if state is None:
        contexts = ids = [np.concatenate([[tokenizer.bos_id], prompt]) for prompt in ids]
    else:  # not strict: `generate` rejects another number of prompts
        pairs = zip(np.asarray(state.recent), ids, strict=False)
        contexts = [np.concatenate([recent[recent >= 0], prompt]) for recent, prompt in pairs]
    streams = [TextStream(tokenizer, context) for context in contexts]
    texts = [""] * len(ids)

    def take(pieces: list[str]) -> None:
        for index, piece in enumerate(pieces):
            texts[index] += piece
        if on_text is not None:
            on_text(pieces)

    generation = generate(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_id=tokenizer.eos_id,
        banned_ids=sorted(ids_without_text(tokenizer, vocab_size)),
        state=state,
        on_tokens=lambda new: take(
            [stream.feed(tokens) for stream, tokens in zip(streams, new, strict=True)]
        ),
        lookup=lookup,
        contexts=[tokenizer.encode(context)] * len(ids),
    )
    take([stream.finish() for stream in streams])
    return Texts(texts, generation.state)


def suggest(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    num: int = 1,
    **settings: Any,
) -> list[str]:
    """Suggest what is between a prefix and a suffix: by greedy decoding, and by `num` - 1 samples.

    Greedy text ends before `RepeatedLines`.
    `settings` are others of `generate_text`. Equal suggestions are given once.

    Raises:
      UserError: a model that does not fill in the middle, or as for `generate_text`.
    """
    vocab_size = model.config.vocab_size
    infilling = Infilling(tokenizer, token_bytes(tokenizer, vocab_size))
    banned_ids = ids_without_text(tokenizer, vocab_size)
    prompt = infilling.prompt(prefix, suffix, banned_ids=banned_ids)
    settings["context"] = prefix + suffix

    def extend(state: DecoderState | None, tokens: Sequence[int] | np.ndarray) -> DecoderState:
        return generate(model, [tokens], max_new_tokens=0, state=state).state

    state = extend(None, prompt.tokens)
    state, num_kept, ids = heal(prompt, state, lambda state, token: extend(state, [token]))
    state = dataclasses.replace(state, logits=jnp.asarray(keep_only(state.logits, ids)))
    found = [*generate_text(model, tokenizer, state=state, **settings | {"temperature": 0.0})]
    if num > 1:
        found += generate_text(model, tokenizer, state=fork_state(state, num - 1), **settings)
    num_typed = prompt.num_typed[num_kept] if prompt.typed else 0
    repeats = RepeatedLines()
    found[0] = repeats.feed(found[0]) + repeats.finish()
    return [text[num_typed:] for text in dict.fromkeys(found)]


class TextStream:
    """Incremental decoder of one sequence that never cuts a character.

    Args:
      tokenizer: decodes the ids.
      context: [n] ids before the first one, usually the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] | np.ndarray = ()) -> None:
        self._tokenizer = tokenizer
        self._ids: np.ndarray = np.zeros(0, np.int64)
        self._num_returned = 0
        self._remember(np.asarray(context[-RECENT_TOKENS:], np.int64))

    def feed(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the characters that `ids` complete; an unfinished one waits for its last byte."""
        self._ids = np.concatenate([self._ids, np.asarray(ids, np.int64)])
        text = self._text()[self._num_returned :]
        self._num_returned += len(text)
        if len(self._ids) > 2 * RECENT_TOKENS:
            self._remember(self._ids)
        return text

    def finish(self) -> str:
        """Return U+FFFD for an unfinished character, otherwise an empty string."""
        return self._text(final=True)[self._num_returned :]

    def _remember(self, ids: np.ndarray) -> None:
        self._ids = ids[-RECENT_TOKENS:]
        self._num_returned = len(self._text())

    def _text(self, final: bool = False) -> str:
        """Decode the remembered ids, without an unfinished last character unless `final`."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return decoder.decode(self._tokenizer.decode_bytes(self._ids), final)


class StopStrings:
    """Text up to the first of some strings; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.held_back = ""
        """Text that may be the beginning of a stop string; one itself once it was found."""
        self.has_ended = False
        """True once a stop string was found."""
        self._num_held_back = max(map(len, stops), default=1) - 1

    def feed(self, text: str) -> str:
        """Return the text that no later one can make part of a stop string."""
        text = self.held_back + text
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        self.has_ended = bool(found)
        end = min(found, default=max(0, len(text) - self._num_held_back))
        self.held_back = text[end:]
        return text[:end]

    def finish(self, text: str = "") -> str:
        """Return the rest, to which `text` is the last addition."""
        text = self.feed(text)
        return text if self.has_ended else text + self.held_back


class RepeatedLines:
    """Text up to a line that repeats the one before, or two that repeat the two before.

    Greedy decoding of a small model often goes on so for ever. A line is held back until it ends.
    """

    def __init__(self) -> None:
        self.has_ended = False
        """True once a repetition was found."""
        self._lines: list[str] = []
        """The last ones, without blank ones."""
        self._held_back = ""

    def feed(self, text: str) -> str:
        """Return the lines that are complete."""
        *lines, self._held_back = (self._held_back + text).split("\n")
        returned = ""
        for line in lines:
            if line.strip():
                self._lines = [*self._lines[-3:], line]
            one, two = self._lines[-2:], self._lines[-4:]
            if line.strip() and (
                (len(one) == 2 and one[0] == line) or (len(two) == 4 and two[:2] == two[2:])
            ):
                self.has_ended = True
                return returned
            returned += f"{line}\n"
        return returned

    def finish(self) -> str:
        """Return the rest."""
        return "" if self.has_ended else self._held_back
