"""Text presented for filling in the middle (Bavarian et al., 2022), as completion needs it.

A document is cut into segments. Some of them are rearranged, with the ids of
`Tokenizer.fim_ids` before their parts, and others stay::

    BOS text <prefix> <suffix> s <middle> p m EOS text ... EOS

The state is carried from one to the next: earlier text of a document is context, as it is in the
prompt of a completion, ``BOS older text <prefix> <suffix> s <middle> p``. In this order (SPM in
the paper), the middle continues the prefix, and a prompt grows at its end while one types. The ids
themselves are not targets; text, and the EOS that ends each middle, are.

A prefix may end inside a token of a vocabulary of longer pieces, or inside what becomes a single
token: "sel" is two tokens, and "self" one. Token healing therefore takes tokens away from the end
of a prompt, and the new text repeats their bytes; see `heal`.
"""

import bisect
import functools
import random
import re
import zlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

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
_MOST_TYPED = 8
"""Tokens at the end of a prefix that one new token may replace."""
_MOST_LINES, _MOST_PREFIX = 200, 8000
"""Lines and characters of a prefix beyond which a client may send the last ones only."""
_KEPT, _KEPT_LENGTH = 128, 1 << 16
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
            "above 0; train one with --config configs/complete.py"
        )
    before_suffix, before_prefix, before_middle = (np.array([x]) for x in tokenizer.fim_ids)
    return [before_prefix, before_suffix, suffix, before_middle, prefix]


def _settled_start(prefix: str) -> int:
    """Return where a long prefix is used from: a line of its first half, chosen by its content."""
    if len(prefix) <= _MOST_PREFIX and prefix.count("\n") <= _MOST_LINES:
        return 0
    lines = re.finditer(r"(?<=\n).*\S.*\n", prefix[: len(prefix) // 2])
    settled = (line.start() for line in lines if zlib.crc32(utf8(line[0])) % 32 == 0)
    return next(settled, 0)


class InfillPrompt(NamedTuple):
    """A prompt for the text between a prefix and a suffix."""

    tokens: np.ndarray
    """[n] int32, without the `typed` ones."""
    num_optional: int
    """Tokens at the beginning, with BOS, that are context of the rest."""
    stable: tuple[int, ...]
    """Numbers of tokens at the beginning that are likely to stay while somebody types."""
    typed: tuple[int, ...] = ()
    """Ids at the end of the prefix, whose bytes the new text repeats."""
    first_ids: tuple[np.ndarray, ...] = ()
    """For each of them, the ids whose bytes begin with the bytes from it on."""
    num_typed: tuple[int, ...] = ()
    """For each of them, the characters from it on."""
    is_full: bool = False
    """True if one more character will make more of the prefix older text."""


class _State(Protocol):
    @property
    def logits(self) -> Any:
        """Of the next token, ``[1, vocab]``."""


State = TypeVar("State", bound=_State)


def heal(
    prompt: InfillPrompt, state: State, extend: Callable[[State, int], State]
) -> tuple[State, int, np.ndarray | None]:
    """Choose how many of the typed tokens stay as they are; the next one begins with the rest.

    What is chosen is the most probable: the product of the probabilities of the tokens that stay,
    and of all tokens that begin with the rest.

    Args:
      prompt: of the state.
      state: after ``prompt.tokens``.
      extend: returns the state after one more token.

    Returns:
      The state after the tokens that stay; their number; and the ids that the next one may have, or
      None if it may have all.
    """
    best, kept = -np.inf, 0.0  # logarithms of probabilities
    chosen: tuple[State, int, np.ndarray | None] = state, 0, None
    for index, (token, ids) in enumerate(zip(prompt.typed, prompt.first_ids, strict=True)):
        logits = np.asarray(state.logits, np.float64)[0]
        logprobs = logits - _log_sum(logits)
        if len(ids) and (score := kept + _log_sum(logprobs[ids])) > best:
            best, chosen = score, (state, index, ids)
        if index + 1 < len(prompt.typed):
            kept += logprobs[token]
            state = extend(state, token)
    return chosen


def _log_sum(logprobs: np.ndarray) -> float:
    highest = logprobs.max()
    return float(highest + np.log(np.exp(logprobs - highest).sum()))


class Infilling:
    """Makes the prompts of a model that fills in the middle.

    Args:
      tokenizer: of a model that was trained with ``data.fim_rate``.
      bytes_of: `token_bytes` of the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, bytes_of: Sequence[bytes]) -> None:
        self._tokenizer, self._bytes_of = tokenizer, bytes_of
        self._sorted_ids = sorted(range(len(bytes_of)), key=bytes_of.__getitem__)
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
        A prefix of over 200 lines or 8,000 characters is used from a line on that its own text
        determines: one that begins a line later, as editors send it, has the same prompt.

        Args:
          prefix: the text before the cursor.
          suffix: the text after it; its first 192 characters are used, up to the end of a line.
          extra: other texts, such as files of the same project, before all of it.
          banned_ids: those that no new token has.
          with_bos: False for a prompt that continues a state.

        Raises:
          UserError: the model does not fill in, or a text has no ids.
        """
        prefix = prefix[_settled_start(prefix) :]
        cut = max(len(prefix) - 1, 0) // _GRID * _GRID
        cut = prefix.rfind("\n", cut - _GRID, cut) + 1 or cut
        if len(suffix) > _MOST_SUFFIX:
            end = suffix.rfind("\n", _MOST_SUFFIX // 2, _MOST_SUFFIX) + 1 or _MOST_SUFFIX
            suffix = suffix[:end]
        before, after = self._tokenizer.encode(prefix[cut:]), self._encode(suffix)
        typed = before[max(0, len(before) - _MOST_TYPED) :].tolist()
        first_ids, num_typed, content, banned = [], [], b"", {*banned_ids}
        for token in reversed(typed):
            content = self._bytes_of[token] + content
            ids = sorted(like for like in self._ids_like(content) if like not in banned)
            first_ids.append(np.array(ids, np.int64))
            is_cut = 0x80 <= (content or b"a")[0] < 0xC0  # inside a character
            num_typed.append(sum(byte & 0xC0 != 0x80 for byte in content) + is_cut)
        while first_ids and len(first_ids[-1]) < 1 + (len(first_ids) == 1):
            first_ids.pop()  # nothing else begins so
        num = len(first_ids)
        typed, before = typed[len(typed) - num :], before[: len(before) - num]
        older = [np.array([self._tokenizer.bos_id] * with_bos, np.int32)]
        older += [self._encode(text) for text in (*extra, prefix[:cut]) if text]
        around = _around(self._tokenizer, before, after)
        tokens = np.concatenate([*older, *around], dtype=np.int32)
        end = len(tokens)
        stable = tuple(range(end - min(len(before), _RETOKENIZED), end + 1))
        num_optional = sum(map(len, older))
        healing = (*typed,), (*reversed(first_ids),), (*reversed(num_typed[:num]),)
        is_full = len(prefix) > 0 and len(prefix) % _GRID == 0
        return InfillPrompt(tokens, num_optional, stable, *healing, is_full)

    def _encode(self, text: str) -> np.ndarray:
        """Encode a text that stays while somebody types."""
        is_short = len(text) <= _KEPT_LENGTH
        return self._encode_kept(text) if is_short else self._tokenizer.encode(text)

    def _ids_like(self, typed: bytes) -> list[int]:
        """Return the ids whose bytes begin with `typed`; none if it is empty."""
        ids, bytes_of = self._sorted_ids, self._bytes_of
        start = bisect.bisect_left(ids, typed, key=bytes_of.__getitem__)
        end = bisect.bisect_right(ids, typed, start, key=lambda id: bytes_of[id][: len(typed)])
        return ids[start:end] if typed else []
