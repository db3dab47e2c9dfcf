"""``prefill.bin`` and ``decode.bin`` (`jax.export`), with weights and state as arguments.

Both are functions of (weights, state, tokens [B, T] int32) to (logits [B, T, vocab], state), for
any B; T is 64 in prefill and 1 in decode. Weights and state are dicts of arrays by name.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax import export

from simplernn_jax.export.forms import TrainedModel, check_packages, state_by_name
from simplernn_jax.export.safetensors.form import description, write_weights
from simplernn_jax.inference.exported_folder import WEIGHTS
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.named_weights import model_from_weights, named_weights

PREFILL_TOKENS = 64
PLATFORMS = ("cpu", "cuda", "tpu")
EXAMPLE = "example.py"


def write(trained: TrainedModel, folder: Path) -> None:
    """See `Form.write`."""
    check_packages("stablehlo", "flatbuffers")
    model = trained.model
    write_weights(trained, folder)
    weights = {name: _shape(x) for name, x in named_weights(model).items()}
    for name, length in (("prefill", PREFILL_TOKENS), ("decode", 1)):
        exported = _export(model, weights, length)
        (folder / f"{name}.bin").write_bytes(exported.serialize())
    state = {name: _shape(x) for name, x in state_by_name(model.initial_state(1))[0].items()}
    content = {
        **description(trained),
        "prefill_tokens": PREFILL_TOKENS,
        "platforms": PLATFORMS,
        "state": {
            name: {"shape": ["B", *x.shape[1:]], "dtype": str(x.dtype)} for name, x in state.items()
        },
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    shutil.copyfile(Path(__file__).with_name(EXAMPLE), folder / EXAMPLE)


def _shape(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _export(model: LanguageModel, weights: dict[str, Any], length: int) -> export.Exported:
    (batch,) = export.symbolic_shape("B")
    state, restore = state_by_name(model.initial_state(1))
    config = model.config

    def run(
        weights: dict[str, jax.Array], state: dict[str, jax.Array], tokens: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = model_from_weights(config, weights, "weights")
        logits, layers = model(tokens, restore(state))
        return logits, state_by_name(layers)[0]

    with_batch = {
        name: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for name, x in state.items()
    }
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    # No paths of this machine.
    limit = jax.config.jax_traceback_in_locations_limit  # type: ignore[attr-defined, unused-ignore]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        return export.export(jax.jit(run), platforms=PLATFORMS)(weights, with_batch, tokens)
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)


class _Loaded:
    """The programs compiled for this machine."""

    def __init__(self, folder: Path) -> None:
        self._weights = safetensors.numpy.load_file(folder / WEIGHTS)
        state = json.loads((folder / "config.json").read_text("utf-8"))["state"]
        self._zero = {name: np.zeros((1, *x["shape"][1:]), x["dtype"]) for name, x in state.items()}
        self._prefill, self._decode = (
            jax.jit(export.deserialize(bytearray((folder / f"{name}.bin").read_bytes())).call)
            for name in ("prefill", "decode")
        )

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        state, parts, position = self._zero, [], 0
        tokens = tokens[None].astype(np.int32)
        while position < tokens.shape[1]:
            is_long = position + PREFILL_TOKENS <= tokens.shape[1]
            run, length = (self._prefill, PREFILL_TOKENS) if is_long else (self._decode, 1)
            logits, state = run(self._weights, state, tokens[:, position : position + length])
            parts.append(np.asarray(logits[0]))
            position += length
        return np.concatenate(parts)

    def greedy(self, token: int, count: int) -> list[int]:
        state, tokens = self._zero, [token]
        for _ in range(count):
            logits, state = self._decode(self._weights, state, np.array([tokens[-1:]], np.int32))
            tokens.append(int(np.argmax(logits[0, -1])))
        return tokens[1:]

    def encode(self, text: str) -> None:
        del text


def load(folder: Path) -> _Loaded:
    """See `Form.load`."""
    return _Loaded(folder)
