"""Completion at a cursor: prompts whose last token may continue, and suggestions from them.

A text up to the cursor may end inside a token of a vocabulary of longer pieces. Token healing takes
its last token away, and conditions the distribution of the first new token on beginning with the
bytes of the one taken: the new text repeats them before what is new.
"""

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from simplernn_jax.data.infilling import infill_ids
from simplernn_jax.data.tokenizer import Tokenizer, ids_without_text
from simplernn_jax.inference.decode import generate
from simplernn_jax.inference.sampling import NextLogits
from simplernn_jax.inference.state import fork_state
from simplernn_jax.inference.text import TextStream, generate_text
from simplernn_jax.models import LanguageModel

IMPOSSIBLE = -1e30
"""Logit of a first token that does not begin with the bytes taken away; its probability is 0."""

_RETOKENIZED = 3
"""Tokens before the cursor that the next character may change."""


class InfillPrompt(NamedTuple):
    """A prompt for the text between a prefix and a suffix."""

    tokens: np.ndarray
    """[n] int32."""
    num_optional: int
    """Tokens at the beginning, with BOS, that are context of the rest."""
    stable: tuple[int, ...]
    """Numbers of tokens at the beginning that are likely to stay while somebody types."""
    first_ids: np.ndarray | None = None
    """[m] int64 ids of which the first new token is one; None allows all."""
    num_typed: int = 0
    """Characters at the beginning of the new text that belong to the prefix."""

    def mask(self, logits: NextLogits) -> Any:
        """Condition the logits after the prompt on `first_ids`; NumPy compiles nothing for it."""
        if self.first_ids is None:
            return logits
        masked = np.full(logits.shape, IMPOSSIBLE, np.float32)
        masked[:, self.first_ids] = np.asarray(logits)[:, self.first_ids]
        return masked


class Infilling:
    """Makes the prompts of a model that fills in the middle."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._ids_like = functools.cache(self._find_ids_like)

    def prompt(
        self, prefix: str, suffix: str, extra: Sequence[str] = (), banned_ids: Collection[int] = ()
    ) -> InfillPrompt:
        """Make the prompt of the place between `prefix` and `suffix`, after `extra` texts.

        Raises:
          UserError: the model does not fill in, or a text that the tokenizer cannot encode.
        """
        tokens = infill_ids(self._tokenizer, prefix, suffix, extra)
        assert self._tokenizer.fim_ids is not None
        marks = np.flatnonzero(np.isin(tokens, self._tokenizer.fim_ids))
        start, end = int(marks[-1]), len(tokens)
        if start == end - 1:  # the prefix is not at the end
            start, end = marks[:2].tolist()
        stable = tuple(range(max(start + 1, end - _RETOKENIZED), end + 1))
        plain = InfillPrompt(tokens, int(marks[0]), stable)
        last = int(tokens[end - 1])
        first_ids = np.setdiff1d(self._ids_like(last), [*banned_ids])
        if end - start == 1 or len(first_ids) < 2:  # nothing else begins like the last token
            return plain
        if end < len(tokens) and self._bytes_of[last][0] & 0xC0 == 0x80:
            return plain  # the suffix would cut a character
        num_typed = len(TextStream(self._tokenizer, tokens[: end - 1]).feed([last]))
        healed = np.delete(tokens, end - 1)
        return InfillPrompt(healed, int(marks[0]), stable[:-1], first_ids, num_typed)

    def _find_ids_like(self, token: int) -> np.ndarray:
        """Return the ids whose bytes begin with those of `token`; none if it has no bytes."""
        found = self._bytes_of[token]
        is_like = [bool(found) and content.startswith(found) for content in self._bytes_of]
        return np.flatnonzero(is_like)

    @functools.cached_property
    def _bytes_of(self) -> list[bytes]:
        """The bytes of all ids inside a text: some decoders change the first token of one."""
        decode, ids = self._tokenizer.decode_bytes, range(self._vocab_size)
        context = next((i for i in ids if decode([i])), 0)
        return [decode([context, i]).removeprefix(decode([context])) for i in ids]


def suggest(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    num: int = 1,
    **settings: Any,
) -> list[str]:
    """Suggest what is between a prefix and a suffix: by greedy decoding, and by `num` - 1 samples.

    `settings` are others of `generate_text`. Equal suggestions are given once.

    Raises:
      UserError: a model that does not fill in the middle, or as for `generate_text`.
    """
    vocab_size = model.config.vocab_size
    banned_ids = ids_without_text(tokenizer, vocab_size)
    prompt = Infilling(tokenizer, vocab_size).prompt(prefix, suffix, banned_ids=banned_ids)
    state = generate(model, [prompt.tokens], max_new_tokens=0).state
    state = dataclasses.replace(state, logits=jnp.asarray(prompt.mask(state.logits)))
    found = [*generate_text(model, tokenizer, state=state, **settings | {"temperature": 0.0})]
    if num > 1:
        found += generate_text(model, tokenizer, state=fork_state(state, num - 1), **settings)
    return [text[prompt.num_typed :] for text in dict.fromkeys(found)]
