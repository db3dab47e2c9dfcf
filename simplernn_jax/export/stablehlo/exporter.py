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

from simplernn_jax.export.formats import TrainedModel, check_packages, state_by_name
from simplernn_jax.export.safetensors.exporter import description
from simplernn_jax.export.two_programs import PREFILL_TOKENS, Program, TwoPrograms
from simplernn_jax.inference.exported_folder import WEIGHTS
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.named_weights import model_from_weights, named_weights
from simplernn_jax.models.pytorch_weights import encode_weights

PLATFORMS = ("cpu", "cuda", "tpu")
EXAMPLE = "example.py"


def write(trained: TrainedModel, folder: Path) -> None:
    """See `Format.write`."""
    check_packages("stablehlo", "flatbuffers")
    model = trained.model
    arrays = named_weights(model)
    (folder / WEIGHTS).write_bytes(encode_weights(arrays))
    weights = {name: _shape(x) for name, x in arrays.items()}
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


def load(folder: Path) -> TwoPrograms:
    """See `Format.load`."""
    weights = safetensors.numpy.load_file(folder / WEIGHTS)
    state = json.loads((folder / "config.json").read_text("utf-8"))["state"]
    zero = {name: np.zeros((1, *x["shape"][1:]), x["dtype"]) for name, x in state.items()}
    prefill, decode = (_program(folder / f"{name}.bin", weights) for name in ("prefill", "decode"))
    return TwoPrograms(prefill, decode, zero, np.int32)


def _program(path: Path, weights: dict[str, np.ndarray]) -> Program:
    """Compile a program for this machine."""
    call = jax.jit(export.deserialize(bytearray(path.read_bytes())).call)

    def run(state: Any, tokens: np.ndarray) -> tuple[np.ndarray, Any]:
        logits, new = call(weights, state, tokens)
        return np.asarray(logits[0]), new

    return run
