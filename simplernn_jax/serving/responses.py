"""Text of continuations from their tokens, and the bodies of responses in OpenAI's form."""

import dataclasses
import secrets
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from starlette.responses import Response

from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.inference.sampling import TokenLogprobs
from simplernn_jax.inference.text import StopStrings, TextStream
from simplernn_jax.serving.jobs import NewTokens


def json_response(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Encode `content` as JSON."""
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> Any:
    """Make OpenAI's error object."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, kind)
    param = param and excerpt(param)
    return {"error": {"message": excerpt(message), "type": kind, "param": param, "code": code}}


def excerpt(text: str) -> str:
    """Shorten a text that a client may have chosen."""
    return text if len(text) <= 1000 else f"{text[:600]}…{text[-300:]}"


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
        self.last_seconds = time.perf_counter()
        """Time of the last tokens, or of its creation, for `Metrics.observe`."""
        self.num_logprobs = num_logprobs
        self._stream = TextStream(tokenizer, context)
        self._stops = StopStrings(stops)
        self._stop_ids = frozenset(stop_ids)
        self._offset = offset
        """Characters returned."""
        self._entries: list[TokenEntry] = []

    def feed(self, new: NewTokens) -> Piece:
        """Take new tokens and return what they complete."""
        tokens, text = new.tokens.tolist(), ""
        is_simple = self.num_logprobs is None and not self._stops.stops
        for index, several in enumerate([tokens] if is_simple else [[token] for token in tokens]):
            self.num_tokens += len(several)
            if self.num_logprobs is not None:
                start = self._offset + len(text) + len(self._stops.held_back)
                entry = token_entry(several[0], start, new.logprobs, index, self.num_logprobs)
                self._entries.append(entry)
            decoded = self._stream.feed([t for t in several if t not in self._stop_ids])
            text += self._stops.feed(decoded)
            if self._stops.has_ended:
                return self._take(text, "stop")
        if new.finish_reason is not None:
            text += self._stops.finish(self._stream.finish())
        return self._take(text, new.finish_reason)

    def _take(self, text: str, reason: str | None) -> Piece:
        """Return `text`, and the tokens that begin in it."""
        self._offset += len(text)
        self.finish_reason = reason
        ready = [entry for entry in self._entries if entry.offset < self._offset]
        if reason is not None and not self._stops.has_ended:
            ready = self._entries  # tokens without text, such as EOS, belong to it
        self._entries = self._entries[len(ready) :]
        return Piece(text, ready, reason)


def token_entry(
    token: int, offset: int, logprobs: TokenLogprobs | None, index: int, num_top: int
) -> TokenEntry:
    """Make the entry of a token from row `index` of `logprobs`; None without a prediction."""
    if logprobs is None:
        return TokenEntry(token, offset, None, [])
    ids = logprobs.top_ids[index, :num_top].tolist()
    top = list(zip(ids, logprobs.top[index, :num_top].tolist(), strict=True))
    return TokenEntry(token, offset, float(logprobs.token[index]), top)


class Completion:
    """Bodies of one text completion."""

    id_prefix = "cmpl-"
    whole = "text_completion"
    chunk = "text_completion"

    def __init__(self, model_name: str, names: TokenNames) -> None:
        self._names = names
        self._head = {
            "id": self.id_prefix + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model_name,
        }

    def response(self, choices: list[Any], usage: Any) -> Any:
        """Make the body of an answer that is not streamed."""
        return {**self._head, "object": self.whole, "choices": choices, "usage": usage}

    def frame(self, choices: list[Any], **more: Any) -> Any:
        """Make a frame of a stream."""
        return {**self._head, "object": self.chunk, "choices": choices, **more}

    def choice(self, index: int, piece: Piece, has_logprobs: bool) -> Any:
        """Make a whole choice, or its part of a frame."""
        return self._choice(index, piece, has_logprobs, text=piece.text)

    def delta(self, index: int, piece: Piece, has_logprobs: bool, is_first: bool) -> Any:
        """Make the part of a choice in a frame."""
        return self.choice(index, piece, has_logprobs)

    def _choice(self, index: int, piece: Piece, has_logprobs: bool, **content: Any) -> Any:
        logprobs = self._logprobs(piece.entries) if has_logprobs else None
        ends = {"logprobs": logprobs, "finish_reason": piece.finish_reason}
        return {"index": index, **content, **ends}

    def _logprobs(self, entries: list[TokenEntry]) -> Any:
        names = self._names.names
        return {
            "tokens": [names[entry.token] for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [
                None if e.logprob is None else {names[token]: value for token, value in e.top}
                for e in entries
            ],
            "text_offset": [entry.offset for entry in entries],
        }


class ChatCompletion(Completion):
    """Bodies of one chat completion."""

    id_prefix = "chatcmpl-"
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def choice(self, index: int, piece: Piece, has_logprobs: bool) -> Any:
        """Make a whole choice."""
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return self._choice(index, piece, has_logprobs, message=message)

    def delta(self, index: int, piece: Piece, has_logprobs: bool, is_first: bool) -> Any:
        """Make the part of a choice in a frame."""
        delta = {"content": piece.text} if piece.text or is_first else {}
        if is_first:
            delta = {"role": "assistant", **delta}
        return self._choice(index, piece, has_logprobs, delta=delta)

    def _logprobs(self, entries: list[TokenEntry]) -> Any:
        def named(token: int, logprob: float | None) -> Any:
            content = list(self._names.bytes_of[token])
            return {"token": self._names.names[token], "logprob": logprob, "bytes": content}

        return {
            "content": [
                {
                    **named(entry.token, entry.logprob),
                    "top_logprobs": [named(token, value) for token, value in entry.top],
                }
                for entry in entries
            ],
            "refusal": None,
        }
