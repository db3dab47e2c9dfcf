"""Completion at a cursor: prompts whose last token may continue, and suggestions from them.

A text up to the cursor may end inside a token of a vocabulary of longer pieces. Token healing takes
its last token away, and conditions the distribution of the first new token on beginning with the
bytes of the one taken: the new text repeats them before what is new.
"""

import bisect
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


_WORD = 16
"""Maximum number of tokens of a word."""


def _is_of_word(byte: bytes) -> bool:
    return byte.isalpha() or byte >= b"\x80"


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

    def prompt(
        self, prefix: str, suffix: str, extra: Sequence[str] = (), banned_ids: Collection[int] = ()
    ) -> InfillPrompt:
        """Make the prompt of a place in a text.

        Args:
          prefix: the text before it.
          suffix: the text after it.
          extra: other texts that are context.
          banned_ids: ids that the first new token must not be.

        Raises:
          UserError: the model does not fill in, or a text that the tokenizer cannot encode.
        """
        tokens = infill_ids(self._tokenizer, prefix, suffix, extra)
        assert self._tokenizer.fim_ids is not None
        marks = np.flatnonzero(np.isin(tokens, self._tokenizer.fim_ids))
        # The prefix is between its mark and the next one, whichever order it has.
        of_prefix = np.flatnonzero(tokens[marks] == self._tokenizer.fim_ids[1])[0]
        start, end = marks[of_prefix : of_prefix + 2].tolist()
        word = end - 1  # more characters may change all its tokens
        while word > max(start + 1, end - _WORD) and not self._begins_word(*tokens[word - 1 :][:2]):
            word -= 1
        plain = InfillPrompt(tokens, int(marks[0]), (word, end))
        last = int(tokens[end - 1])
        first_ids = np.setdiff1d(self._ids_like(last), [*banned_ids])
        if end - start == 1 or len(first_ids) < 2:  # nothing else begins like the last token
            return plain
        if end < len(tokens) - 1 and self._bytes_of(last)[0] & 0xC0 == 0x80:
            return plain  # the suffix would cut a character
        typed = TextStream(self._tokenizer, tokens[: end - 1]).feed([last])
        tokens = np.delete(tokens, end - 1)
        return InfillPrompt(tokens, int(marks[0]), (word, end - 1), first_ids, len(typed))

    def _begins_word(self, before: int, token: int) -> bool:
        """Return whether pieces of words, as vocabularies have them, end between two tokens."""
        first, last = self._bytes_of(token)[:1], self._bytes_of(before)[-1:]
        return first.isspace() or _is_of_word(first) != _is_of_word(last)

    def _ids_like(self, token: int) -> np.ndarray:
        """Return the ids whose bytes begin with those of `token`; none if it has no bytes."""
        contents, ids = self._sorted
        found = self._bytes_of(token)
        start = bisect.bisect_left(contents, found)
        end = start
        while found and end < len(contents) and contents[end].startswith(found):
            end += 1
        return np.array(ids[start:end], np.int64)

    def _bytes_of(self, token: int) -> bytes:
        """Return the bytes of a token inside a text; some decoders change the first one."""
        decode, context = self._tokenizer.decode_bytes, self._context
        return decode([*context, token]).removeprefix(decode(context))

    @functools.cached_property
    def _context(self) -> list[int]:
        ids = range(self._vocab_size)
        return [next((i for i in ids if self._tokenizer.decode_bytes([i])), 0)]

    @functools.cached_property
    def _sorted(self) -> tuple[list[bytes], list[int]]:
        """The bytes of all ids that have some, sorted, and the ids."""
        pairs = sorted((self._bytes_of(i), i) for i in range(self._vocab_size))
        return [content for content, _ in pairs], [number for _, number in pairs]


def suggest(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    *,
    num: int = 1,
    max_new_tokens: int,
    temperature: float,
    **settings: Any,
) -> list[str]:
    """Suggest texts between a prefix and a suffix, each once: greedy decoding first, then samples.

    Args:
      model: the language model.
      tokenizer: the one it was trained with.
      prefix: the text before the cursor.
      suffix: the text after it.
      num: maximum number of suggestions.
      max_new_tokens, temperature: as for `generate`; the first suggestion has temperature 0.
      **settings: others of `generate`.

    Raises:
      UserError: a model that does not fill in the middle, or as for `generate`.
    """
    vocab_size = model.config.vocab_size
    banned_ids = ids_without_text(tokenizer, vocab_size)
    prompt = Infilling(tokenizer, vocab_size).prompt(prefix, suffix, banned_ids=banned_ids)
    state = generate(model, [prompt.tokens], max_new_tokens=0).state
    state = dataclasses.replace(state, logits=jnp.asarray(prompt.mask(state.logits)))
    texts: dict[str, None] = {}
    for count, heat in ((1, 0.0), (num - 1, temperature)):
        if count:
            forked, fields = fork_state(state, count), {"temperature": heat, **settings}
            texts |= dict.fromkeys(
                generate_text(
                    model, tokenizer, state=forked, max_new_tokens=max_new_tokens, **fields
                )
            )
    return [text[prompt.num_typed :] for text in texts]
