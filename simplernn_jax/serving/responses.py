"""Bodies of responses: completions and chat completions as OpenAI's, infill as llama.cpp's."""

import secrets
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from simplernn_jax.serving.answers import Answer, Piece, TokenEntry
from simplernn_jax.serving.requests import ChatRequest, CompletionRequest, InfillRequest


class TokenNames:
    """Names and bytes of the ids of a tokenizer, by its `token_bytes`.

    A token's name is its text; bytes that are part of a character are ``bytes:\\xNN``, as in
    OpenAI's API. Tokens without a text, or with one that another token has, are ``token_id:N``.
    """

    def __init__(self, bytes_of: Sequence[bytes]) -> None:
        self.bytes_of = bytes_of
        names = [_name(content) for content in bytes_of]
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


class Completion:
    """Bodies of one text completion."""

    id_prefix = "cmpl-"
    whole = "text_completion"
    chunk = "text_completion"
    last = b"data: [DONE]\n\n"
    """The end of a stream."""

    def __init__(
        self, request: CompletionRequest | ChatRequest, model_name: str, names: TokenNames
    ) -> None:
        self._names = None if request.num_logprobs is None else names
        options = request.stream_options
        self._with_usage = options is not None and options.include_usage
        self._head = {
            "id": self.id_prefix + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model_name,
        }

    def response(self, pieces: list[Piece], answer: Answer) -> Any:
        """Make the body of an answer that is not streamed."""
        choices = [self._choice(index, piece) for index, piece in enumerate(pieces)]
        return {**self._head, "object": self.whole, "choices": choices, "usage": answer.usage}

    def frame(self, index: int, piece: Piece, is_first: bool) -> Any:
        """Make a frame of a stream, which may be the first one of a choice."""
        more = {"usage": None} if self._with_usage else {}
        choices = [self._choice(index, piece, is_first)]
        return {**self._head, "object": self.chunk, "choices": choices, **more}

    def last_frames(self, answer: Answer) -> list[Any]:
        """Make the frames after all choices."""
        frame = {**self._head, "object": self.chunk, "choices": [], "usage": answer.usage}
        return [frame] if self._with_usage else []

    def _choice(self, index: int, piece: Piece, is_first: bool | None = None) -> Any:
        """Make a whole choice or, given whether it is the first, its part of a frame."""
        logprobs = self._logprobs(self._names, piece.entries) if self._names else None
        ends = {"logprobs": logprobs, "finish_reason": piece.finish_reason}
        return {"index": index, **self._content(piece, is_first), **ends}

    def _content(self, piece: Piece, is_first: bool | None) -> dict[str, Any]:
        return {"text": piece.text}

    def _logprobs(self, names: TokenNames, entries: list[TokenEntry]) -> Any:
        name = names.names
        return {
            "tokens": [name[entry.token] for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [
                None if e.logprob is None else {name[token]: value for token, value in e.top}
                for e in entries
            ],
            "text_offset": [entry.offset for entry in entries],
        }


class ChatCompletion(Completion):
    """Bodies of one chat completion."""

    id_prefix = "chatcmpl-"
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def _content(self, piece: Piece, is_first: bool | None) -> dict[str, Any]:
        if is_first is None:
            return {"message": {"role": "assistant", "content": piece.text, "refusal": None}}
        role = {"role": "assistant"} if is_first else {}
        return {"delta": role | ({"content": piece.text} if piece.text or is_first else {})}

    def _logprobs(self, names: TokenNames, entries: list[TokenEntry]) -> Any:
        def named(token: int, logprob: float | None) -> Any:
            content = list(names.bytes_of[token])
            return {"token": names.names[token], "logprob": logprob, "bytes": content}

        content = [
            named(entry.token, entry.logprob)
            | {"top_logprobs": [named(token, value) for token, value in entry.top]}
            for entry in entries
        ]
        return {"content": content, "refusal": None}


class Infill:
    """Bodies of one infill."""

    last = b""

    def __init__(self, request: InfillRequest, model_name: str, *_: Any) -> None:
        self._fields, self._model_name = request.response_fields, model_name

    def response(self, pieces: list[Piece], answer: Answer) -> Any:
        """Make the body of an answer that is not streamed."""
        usage, (choice,) = answer.usage, answer.choices
        num_prompt, num_new = usage["prompt_tokens"], usage["completion_tokens"]
        reason = "eos" if choice.finish_reason == "stop" else "limit"
        body = {
            "content": "".join(piece.text for piece in pieces),
            "stop": True,
            "stop_type": "word" if choice.stopping_word else reason,
            "stopping_word": choice.stopping_word,
            "model": self._model_name,
            "tokens_predicted": num_new,
            "tokens_evaluated": num_prompt,
            "tokens_cached": answer.cached_tokens,
            "truncated": answer.left_out > 0,
            "timings": _timings(
                "prompt", num_prompt - answer.cached_tokens, answer.prefilled - answer.began
            )
            | _timings("predicted", num_new, answer.ended - answer.prefilled),
        }
        if self._fields is None:
            return body
        paths = body | {f"timings/{name}": value for name, value in body["timings"].items()}
        return {path: paths[path] for path in self._fields if path in paths}

    def frame(self, index: int, piece: Piece, is_first: bool) -> Any:
        """Make a frame of a stream."""
        return {"content": piece.text, "stop": False}

    def last_frames(self, answer: Answer) -> list[Any]:
        """Make the frame after the text."""
        return [self.response([], answer)]


def _timings(name: str, count: int, seconds: float) -> dict[str, float]:
    return {
        f"{name}_n": count,
        f"{name}_ms": 1e3 * seconds,
        f"{name}_per_token_ms": 1e3 * seconds / max(count, 1),
        f"{name}_per_second": count / max(seconds, 1e-9),
    }
