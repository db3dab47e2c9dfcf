"""Text presented for filling in the middle (Bavarian et al., 2022), as completion needs it.

A document is cut into segments. Some of them are rearranged, with the ids of
`Tokenizer.fim_ids` before their parts, and others stay::

    BOS text <prefix> <suffix> s <middle> p m EOS text ... EOS

The state is carried from one to the next: earlier text of a document is context, as it is in the
prompt of a completion, ``BOS older text <prefix> <suffix> s <middle> p``. In this order (SPM in
the paper), the middle continues the prefix, and a prompt grows at its end while one types. The ids
themselves are not targets; text, and the EOS that ends each middle, are.

A prefix may end inside a token of a vocabulary of longer pieces. Token healing takes the last token
of a prompt away, and the first new one must begin with its bytes: the new text repeats them.
"""

import functools
import random
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from simplernn_jax.data.documents import utf8
from simplernn_jax.data.tokenizer import InfillingTokenizer, Tokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.files import sha256_hex

_SHORTEST, _LONGEST = 32, 384
"""Characters of a segment, uniformly distributed: most middles are in one sequence of training with
all that is around them."""
_AT_START, _AT_END = 0.05, 0.15
"""Probability that nothing is before the cursor, and that nothing is after the middle."""
_LINE = 0.7
"""Probability that a middle ends with the cursor's line; else it ends at a random place."""
_GRID = 128
"""Characters of the prefix that come after the suffix in a prompt, at most twice as many: a
recurrent state forgets, and training has them no further from the suffix."""
_MOST_SUFFIX = 192
"""Characters of the suffix in a prompt."""
_RETOKENIZED = 3
"""Tokens before the cursor that the next character may change."""
_KEPT, _KEPT_LENGTH = 32, 1 << 16
"""Texts whose ids are kept, and characters of each at most: encoding a page takes as long as eight
new tokens."""


def present(tokenizer: Tokenizer, text: str, rate: float, seed: int) -> np.ndarray:
    """Encode a piece of a document as [n] int32 ids; all draws follow from `seed` and `text`.

    Args:
      tokenizer: an `InfillingTokenizer`.
      text: what is encoded, each character once.
      rate: probability that a segment is rearranged.
      seed: of the draws.

    Raises:
      UserError: as for `Tokenizer.encode`.
    """
    # `random.random` is the same in every version of Python; its other draws need not be.
    draw = random.Random(sha256_hex(b"%d " % seed + utf8(text))).random
    parts, start = [np.empty(0, np.int32)], 0
    while start < len(text):
        stop = min(len(text), start + _SHORTEST + int(draw() * (_LONGEST - _SHORTEST)))
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        if draw() >= rate:
            parts.append(tokenizer.encode(text[start:stop]))
        else:
            cursor = start if draw() < _AT_START else start + int(draw() * (stop - start + 1))
            end = cursor + int(draw() * (stop - cursor + 1))
            if draw() < _LINE:
                end = text.find("\n", cursor, stop)
                end = stop if end < 0 else end
            if end > start and draw() < _AT_END:
                stop = end
            prefix, middle, suffix = text[start:cursor], text[cursor:end], text[end:stop]
            parts += _around(tokenizer, tokenizer.encode(prefix), tokenizer.encode(suffix))
            parts += tokenizer.encode(middle), np.array([tokenizer.eos_id])
        start = stop
    return np.concatenate(parts, dtype=np.int32)


def _around(tokenizer: Tokenizer, prefix: np.ndarray, suffix: np.ndarray) -> list[np.ndarray]:
    """Arrange a prefix and a suffix before the middle."""
    if not isinstance(tokenizer, InfillingTokenizer):
        raise UserError(
            "this model does not fill in the middle: it was not trained with config.data.fim_rate "
            "above 0; train one with --config configs/complete.py, or pass no suffix"
        )
    before_suffix, before_prefix, before_middle = (np.array([x]) for x in tokenizer.fim_ids)
    return [before_prefix, before_suffix, suffix, before_middle, prefix]


class InfillPrompt(NamedTuple):
    """A prompt for the text between a prefix and a suffix."""

    tokens: np.ndarray
    """[n] int32."""
    num_optional: int
    """Tokens at the beginning, with BOS, that are context of the rest."""
    stable: tuple[int, ...]
    """Numbers of tokens at the beginning that are likely to stay while somebody types."""
    first_ids: np.ndarray | None = None
    """[m] int64 ids that the first new token may have; None allows all."""
    num_typed: int = 0
    """Characters at the beginning of the new text that belong to the prefix."""


class Infilling:
    """Makes the prompts of a model that fills in the middle.

    Args:
      tokenizer: of a model that was trained with ``data.fim_rate``.
      bytes_of: `token_bytes` of the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, bytes_of: Sequence[bytes]) -> None:
        self._tokenizer, self._bytes_of = tokenizer, bytes_of
        self._ids_like = functools.cache(self._find_ids_like)
        self._encode_kept = functools.lru_cache(_KEPT)(tokenizer.encode)

    def prompt(
        self,
        prefix: str,
        suffix: str,
        extra: Sequence[str] = (),
        banned_ids: Collection[int] = (),
        *,
        with_bos: bool = True,
    ) -> InfillPrompt:
        """Make the prompt of the place between `prefix` and `suffix`, as training presents it.

        One more character of the prefix changes only the end of the prompt, unless the prefix
        passes a multiple of 128 characters: then more of it becomes older text, before the suffix.

        Args:
          prefix: the text before the cursor.
          suffix: the text after it; its first 192 characters are used, up to the end of a line.
          extra: other texts, such as files of the same project, before all of it.
          banned_ids: those that no new token has.
          with_bos: False for a prompt that continues a state.

        Raises:
          UserError: the model does not fill in, or a text has no ids.
        """
        cut = max(len(prefix) - 1, 0) // _GRID * _GRID
        cut = prefix.rfind("\n", cut - _GRID, cut) + 1 or cut
        if len(suffix) > _MOST_SUFFIX:
            end = suffix.rfind("\n", _MOST_SUFFIX // 2, _MOST_SUFFIX) + 1 or _MOST_SUFFIX
            suffix = suffix[:end]
        before, after = self._tokenizer.encode(prefix[cut:]), self._encode(suffix)
        first_ids, num_typed = None, 0
        if len(before):
            typed = self._bytes_of[before[-1]]
            first_ids = np.setdiff1d(self._ids_like(typed), [*banned_ids])
            is_cut = 0x80 <= (typed or b"a")[0] < 0xC0  # inside a character
            if len(first_ids) < 2:
                first_ids = None  # nothing else begins so
            else:
                before = before[:-1]
                num_typed = sum(byte & 0xC0 != 0x80 for byte in typed) + is_cut
        older = [np.array([self._tokenizer.bos_id] * with_bos, np.int32)]
        older += [self._encode(text) for text in (*extra, prefix[:cut]) if text]
        around = _around(self._tokenizer, before, after)
        tokens = np.concatenate([*older, *around], dtype=np.int32)
        end = len(tokens)
        stable = tuple(range(end - min(len(before), _RETOKENIZED), end + 1))
        return InfillPrompt(tokens, sum(map(len, older)), stable, first_ids, num_typed)

    def _encode(self, text: str) -> np.ndarray:
        """Encode a text that stays while somebody types."""
        is_short = len(text) <= _KEPT_LENGTH
        return self._encode_kept(text) if is_short else self._tokenizer.encode(text)

    def _find_ids_like(self, typed: bytes) -> np.ndarray:
        """Return the ids whose bytes begin with `typed`; none if it is empty."""
        is_like = [bool(typed) and content.startswith(typed) for content in self._bytes_of]
        return np.flatnonzero(is_like)
