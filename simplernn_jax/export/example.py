"""Generate text with an export of the format stablehlo or onnx, whose README.md says what it needs.

python example.py "The beginning of a text, or a message to a chat model"
"""

import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

PREFILL_TOKENS = 64

Program = Callable[[Any, np.ndarray], tuple[np.ndarray, Any]]
"""Map from (state, tokens [1, T]) to (logits [T, vocab], state)."""


def stablehlo_programs(folder: Path) -> list[Program]:
    """Load prefill and decode; `jax.jit` compiles them when they are called first."""
    import jax
    import safetensors.numpy
    from jax import export

    weights = safetensors.numpy.load_file(folder / "model.safetensors")

    def run(program: Any, state: Any, tokens: np.ndarray) -> tuple[np.ndarray, Any]:
        logits, new = program(weights, state, tokens.astype(np.int32))
        return np.array(logits[0]), new

    files = [bytearray((folder / name).read_bytes()) for name in ("prefill.bin", "decode.bin")]
    return [functools.partial(run, jax.jit(export.deserialize(file).call)) for file in files]


def onnx_programs(folder: Path) -> list[Program]:
    """Load prefill and decode into ONNX Runtime."""
    import onnxruntime

    def run(session: Any, state: dict[str, np.ndarray], tokens: np.ndarray) -> Any:
        logits, *new = session.run(None, {"tokens": tokens.astype(np.int64), **state})
        return logits[0], dict(zip(state, new, strict=True))

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    paths = [folder / name for name in ("prefill.onnx", "decode.onnx")]
    sessions = [onnxruntime.InferenceSession(path, options, providers) for path in paths]
    return [functools.partial(run, session) for session in sessions]


class ExportedModel:
    """The model in `folder`: a program for prefill of 64 tokens, and one for decoding of one."""

    def __init__(self, folder: Path) -> None:
        load = onnx_programs if (folder / "decode.onnx").exists() else stablehlo_programs
        self._prefill, self._decode = load(folder)
        self._config = json.loads((folder / "config.json").read_text("utf-8"))
        self._initial_state = {
            name: np.full((1, *part["shape"][1:]), part["value"], part["dtype"])
            for name, part in self._config["state"].items()
        }
        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.encode_special_tokens = True  # in a text, their names are text

    def encode(self, text: str) -> list[int]:
        """Encode `text` without BOS."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def logits(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Compute the logits after each of [T] tokens: [T, vocab]."""
        return self._feed(self._initial_state, tokens)[0]

    def text(self, prompt: str, max_new_tokens: int) -> str:
        """Continue a text greedily; a chat model answers it."""
        chat = self._config["chat"]
        stop = chat["stop"] if chat else None
        if chat:
            prompt = prompt.strip().join(chat["first"])
        ids = [self._config["bos_token_id"], *self.encode(prompt)]
        generated: list[int] = []
        text, state = "", self._initial_state
        while len(generated) < max_new_tokens and not (stop and stop in text):
            logits, state = self._feed(state, ids)
            logits[-1, self._config["suppress_tokens"]] = -np.inf
            ids = [int(logits[-1].argmax())]
            if ids[0] == self._config["eos_token_id"]:
                break
            generated += ids
            text = self._tokenizer.decode(generated)
        return text.partition(stop)[0] if stop else text

    def _feed(self, state: Any, ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, Any]:
        tokens, parts = np.asarray(ids)[None], []
        while tokens.size:
            is_long = tokens.size >= PREFILL_TOKENS
            run, length = (self._prefill, PREFILL_TOKENS) if is_long else (self._decode, 1)
            logits, state = run(state, tokens[:, :length])
            parts.append(logits)
            tokens = tokens[:, length:]
        return np.concatenate(parts), state


if __name__ == "__main__":
    print(ExportedModel(Path(__file__).parent).text(" ".join(sys.argv[1:]), max_new_tokens=200))
