"""A model that is exported as two programs: prefill of many tokens, and decoding of one."""

from collections.abc import Callable
from typing import Any

import numpy as np

PREFILL_TOKENS = 64

Program = Callable[[Any, np.ndarray], tuple[np.ndarray, Any]]
"""Map from (state, tokens [1, T]) to (logits [T, vocab], state)."""


class TwoPrograms:
    """An exported model in these two programs; `prefill` takes `PREFILL_TOKENS` tokens."""

    def __init__(self, prefill: Program, decode: Program, initial_state: Any, dtype: Any) -> None:
        self._prefill, self._decode = prefill, decode
        self._initial_state, self._dtype = initial_state, dtype

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """See `Loaded.logits`."""
        state, parts, position = self._initial_state, [], 0
        tokens = tokens[None].astype(self._dtype)
        while position < tokens.shape[1]:
            is_long = position + PREFILL_TOKENS <= tokens.shape[1]
            run, length = (self._prefill, PREFILL_TOKENS) if is_long else (self._decode, 1)
            part, state = run(state, tokens[:, position : position + length])
            parts.append(part)
            position += length
        return np.concatenate(parts)

    def greedy(self, token: int, count: int) -> list[int]:
        """See `Loaded.greedy`."""
        state, tokens = self._initial_state, [token]
        for _ in range(count):
            logits, state = self._decode(state, np.array([tokens[-1:]], self._dtype))
            tokens.append(int(np.argmax(logits[-1])))
        return tokens[1:]

    def encode(self, text: str) -> None:
        """See `Loaded.encode`: there is no tokenizer."""
