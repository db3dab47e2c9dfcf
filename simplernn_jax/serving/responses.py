"""Bodies of responses in OpenAI's form."""

import secrets
import time
from typing import Any

from simplernn_jax.serving.answers import PromptResult
from simplernn_jax.serving.choice_text import Piece, TokenEntry
from simplernn_jax.serving.service import Service


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> Any:
    """Make OpenAI's error object."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, kind)
    param = param and excerpt(param)
    return {"error": {"message": excerpt(message), "type": kind, "param": param, "code": code}}


def excerpt(text: str) -> str:
    """Shorten a text that a client may have chosen."""
    return text if len(text) <= 1000 else f"{text[:600]}…{text[-300:]}"


def usage(results: list[PromptResult]) -> Any:
    """Count the tokens of a request."""
    prompt = sum(len(result.job.tokens) for result in results)
    new = sum(choice.num_tokens for result in results for choice in result.choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(r.cached_tokens for r in results)},
    }


class Completion:
    """Bodies of one text completion."""

    id_prefix = "cmpl-"
    whole = "text_completion"
    chunk = "text_completion"

    def __init__(self, service: Service) -> None:
        self._names = service.names
        self._head = {
            "id": self.id_prefix + secrets.token_hex(12),
            "created": int(time.time()),
            "model": service.model_name,
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
