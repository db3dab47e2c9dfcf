"""Bodies of answers in OpenAI's form."""

import secrets
import time
from collections import Counter
from typing import Any

from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.serving.answers import Piece, TokenEntry


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


class Completion:
    """Bodies of one text completion; `names` if it has log-probabilities."""

    id_prefix = "cmpl-"
    whole = "text_completion"
    chunk = "text_completion"

    def __init__(self, model_name: str, names: TokenNames | None) -> None:
        self._names = names
        self._head = {
            "id": self.id_prefix + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model_name,
        }

    def response(self, pieces: list[Piece], usage: Any) -> Any:
        """Make the body of an answer that is not streamed."""
        choices = [self._choice(i, piece, self._whole(piece)) for i, piece in enumerate(pieces)]
        return {**self._head, "object": self.whole, "choices": choices, "usage": usage}

    def frame(self, choices: list[Any], **more: Any) -> Any:
        """Make a frame of a stream."""
        return {**self._head, "object": self.chunk, "choices": choices, **more}

    def delta(self, index: int, piece: Piece, is_first: bool) -> Any:
        """Make the part of a choice in a frame."""
        return self._choice(index, piece, self._delta(piece, is_first))

    def _choice(self, index: int, piece: Piece, content: dict[str, Any]) -> Any:
        logprobs = self._logprobs(self._names, piece.entries) if self._names else None
        ends = {"logprobs": logprobs, "finish_reason": piece.finish_reason}
        return {"index": index, **content, **ends}

    def _whole(self, piece: Piece) -> dict[str, Any]:
        return {"text": piece.text}

    def _delta(self, piece: Piece, is_first: bool) -> dict[str, Any]:
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

    def _whole(self, piece: Piece) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": piece.text, "refusal": None}}

    def _delta(self, piece: Piece, is_first: bool) -> dict[str, Any]:
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
