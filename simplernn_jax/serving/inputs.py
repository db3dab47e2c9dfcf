"""Convert fields of requests to token ids and sampling settings, checked."""

import hashlib
import secrets

import numpy as np

from simplernn_jax.data.tokenizer import Tokenizer, ids_without_text
from simplernn_jax.errors import UserError
from simplernn_jax.serving.jobs import Sampling
from simplernn_jax.serving.requests import (
    CompletionRequest,
    RequestError,
    SamplingFields,
    parse_prompts,
)


class Inputs:
    """Conversion of requests for one vocabulary, at least as large as the tokenizer's."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._banned_ids = ids_without_text(tokenizer, vocab_size)

    def encode(self, text: str) -> np.ndarray:
        """Encode `text`; raises `RequestError` if the tokenizer cannot."""
        try:
            return self._tokenizer.encode(text)
        except UserError as error:
            raise RequestError(str(error), param="prompt") from error

    def prompts(self, request: CompletionRequest) -> list[tuple[str, np.ndarray]]:
        """Return echoed text and ids of each prompt; raises `RequestError` for wrong ones."""
        several = parse_prompts(request.prompt)
        ids = [self.prompt(one, request.state is not None) for one in several]
        if not request.echo:
            return [("", one) for one in ids]
        texts = [p if isinstance(p, str) else self._tokenizer.decode(p) for p in several]
        return list(zip(texts, ids, strict=True))

    def prompt(self, prompt: str | list[int], has_state: bool) -> np.ndarray:
        """Return the ids of a prompt; a text begins with BOS unless it continues a state."""
        if isinstance(prompt, str):
            ids = self.encode(prompt)
            if not has_state:
                ids = np.concatenate([[self._tokenizer.bos_id], ids])
            return ids.astype(np.int32)
        self.check_ids("prompt", prompt)
        if not prompt and not has_state:
            raise RequestError("prompt: a list of token ids is empty", param="prompt")
        return np.array(prompt, np.int32)

    def check_ids(self, param: str, ids: list[int]) -> None:
        """Check that all ids are in the vocabulary."""
        largest = max(ids, default=0)
        if largest >= self._vocab_size:
            raise RequestError(
                f"{param}: token {largest} is outside the vocabulary of {self._vocab_size}",
                param=param,
            )

    def sampling(self, request: SamplingFields) -> Sampling:
        """Convert settings; `RequestError` for ids outside the vocabulary, or if all are banned."""
        stop_ids, banned = request.stop_token_ids or [], request.banned_token_ids or []
        self.check_ids("stop_token_ids", stop_ids)
        self.check_ids("banned_token_ids", banned)
        bias = {}
        for key, added in (request.logit_bias or {}).items():
            is_id = key.isascii() and key.isdecimal() and len(key) <= 10
            if not is_id or int(key) >= self._vocab_size:
                raise RequestError(
                    f"logit_bias: {key!r} is not a token id below {self._vocab_size}",
                    param="logit_bias",
                )
            bias[int(key)] = added
        if len(self._banned_ids.union(banned)) >= self._vocab_size:
            raise RequestError(
                "banned_token_ids: leave at least one token", param="banned_token_ids"
            )
        if not request.ignore_eos:
            stop_ids = [*stop_ids, self._tokenizer.eos_id]
        temperature = 1.0 if request.temperature is None else request.temperature

        def value(field: float | None, default: float) -> float:
            return default if field is None else field

        return Sampling(
            temperature=temperature,
            top_k=max(0, min(request.top_k or 0, self._vocab_size)),
            top_p=value(request.top_p, 1.0),
            min_p=value(request.min_p, 0.0),
            repetition_penalty=value(request.repetition_penalty, 1.0),
            presence_penalty=value(request.presence_penalty, 0.0),
            frequency_penalty=value(request.frequency_penalty, 0.0),
            logit_bias=bias,
            banned_ids=tuple(sorted(self._banned_ids.union(banned))),
            stop_ids=tuple(sorted({*stop_ids})),
            seed=_seed(request.seed),
        )


def _seed(seed: int | None) -> int:
    """Seed of 32 bits: of a larger or negative one, a digest; of none, a random one."""
    if seed is None:
        return secrets.randbits(32)
    if 0 <= seed < 2**32:
        return seed
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "little")
