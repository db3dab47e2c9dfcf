"""Text of one continuation from its tokens, cut at stop strings, with log-probabilities."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.inference.text import TextStream
from simplernn_jax.serving.jobs import Logprobs, NewTokens


class TokenNames:
    """Names and bytes of the ids of a tokenizer.

    A token's name is its text; bytes that are part of a character are ``bytes:\\xNN``, as in
    OpenAI's API. Tokens without a text, or with one that another token has, are ``token_id:N``.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.bytes_of = [tokenizer.decode_bytes([number]) for number in range(vocab_size)]
        names = [_name(content) for content in self.bytes_of]
        uses = Counter(names)
        self.names = [
            name
            if name and uses[name] == 1 and not name.startswith("token_id:")
            else f"token_id:{i}"
            for i, name in enumerate(names)
        ]


def _name(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class TokenEntry(NamedTuple):
    """A token with its log-probability, if requested."""

    token: int
    offset: int
    """Characters before it."""
    logprob: float | None
    """None for the first token of a prompt, which nothing predicts."""
    top: list[tuple[int, float]]


@dataclasses.dataclass
class Piece:
    """Addition of a step to a continuation."""

    text: str
    entries: list[TokenEntry]
    finish_reason: str | None


class ChoiceText:
    """Incremental text of one continuation.

    A character is never cut, and text that may be the beginning of a stop string is held back.

    Args:
      tokenizer: of the tokens.
      context: ids before the first one.
      stops: strings that end the text, which does not contain them.
      stop_ids: ids that end it; their text is not part of it.
      num_logprobs: alternatives of each token, or None to report no entries.
      offset: characters before the text, for the offsets of the entries.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        context: np.ndarray,
        stops: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        num_logprobs: int | None = None,
        offset: int = 0,
    ) -> None:
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self._stream = TextStream(tokenizer, context)
        self._stops = tuple(stops)
        self._stop_ids = frozenset(stop_ids)
        self.num_logprobs = num_logprobs
        self._held_back = max(map(len, self._stops), default=1) - 1
        self._text = ""
        """Decoded, not yet returned."""
        self._offset = offset
        """Characters returned."""
        self._entries: list[TokenEntry] = []

    def feed(self, new: NewTokens) -> Piece:
        """Take new tokens and return what they complete."""
        tokens = new.tokens.tolist()
        if self.num_logprobs is None and not self._stops:
            self.num_tokens += len(tokens)
            self._text += self._stream.feed([t for t in tokens if t not in self._stop_ids])
            tokens = []
        for index, token in enumerate(tokens):
            self.num_tokens += 1
            start = self._offset + len(self._text)
            if token not in self._stop_ids:
                self._text += self._stream.feed([token])
            if self.num_logprobs is not None:
                self._entries.append(
                    token_entry(token, start, new.logprobs, index, self.num_logprobs)
                )
            # The text before was searched already.
            at = self._find_stop(start - self._offset - self._held_back)
            if at is not None:
                return self._finish(at, "stop")
        if new.finish_reason is None:
            return self._take(max(0, len(self._text) - self._held_back), None)
        start = len(self._text) - self._held_back
        self._text += self._stream.finish()
        at = self._find_stop(start)
        return self._finish(len(self._text) if at is None else at, new.finish_reason)

    def _find_stop(self, start: int) -> int | None:
        found = [self._text.find(stop, max(0, start)) for stop in self._stops]
        return min((at for at in found if at >= 0), default=None)

    def _finish(self, end: int, reason: str) -> Piece:
        self.finish_reason = reason
        piece = self._take(end, reason)
        if not self._text:  # no stop string: tokens without text, such as EOS, belong to it
            piece.entries += self._entries
        return piece

    def _take(self, length: int, reason: str | None) -> Piece:
        """Return `length` characters, and the tokens that begin in them."""
        text, self._text = self._text[:length], self._text[length:]
        self._offset += length
        ready = [entry for entry in self._entries if entry.offset < self._offset]
        self._entries = self._entries[len(ready) :]
        return Piece(text, ready, reason)


def token_entry(
    token: int, offset: int, logprobs: Logprobs | None, index: int, num_top: int
) -> TokenEntry:
    """Make the entry of a token from row `index` of `logprobs`; None without a prediction."""
    if logprobs is None:
        return TokenEntry(token, offset, None, [])
    ids = logprobs.top_ids[index, :num_top].tolist()
    top = list(zip(ids, logprobs.top[index, :num_top].tolist(), strict=True))
    return TokenEntry(token, offset, float(logprobs.token[index]), top)
