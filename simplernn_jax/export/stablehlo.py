"""StableHLO programs ``prefill.bin`` and ``decode.bin``, serialized by `jax.export`.

Both are functions of (weights, state, tokens [B, T] int32) to (logits [B, T, vocab], state), for
any B; T is 64 in prefill and 1 in decode. Weights and state are dicts of arrays by name.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from simplernn_jax.array_types import ModelState
from simplernn_jax.export.example import PREFILL_TOKENS, ExportedModel
from simplernn_jax.export.formats import TrainedModel, check_packages, write_example
from simplernn_jax.inference.loading import WEIGHTS
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.pytorch_weights import encode_weights, model_from_weights, named_weights
from simplernn_jax.parallel.named_leaves import named_leaves

PLATFORMS = ("cpu", "cuda", "tpu")
README = {
    "kind": "as StableHLO",
    "packages": "jax flatbuffers safetensors tokenizers",
    "programs": "| `prefill.bin`, `decode.bin` | programs for CPU, CUDA and TPU, serialized by "
    "`jax.export` |\n| `model.safetensors` | the weights |",
    "arguments": "Both programs are functions of (weights, state, tokens `[B, T]` int32) to "
    "(logits\n`[B, T, vocab]`, state), for any B. Weights and state are dicts of arrays by name.",
}


def write(trained: TrainedModel, folder: Path) -> None:
    """Write the files."""
    check_packages("stablehlo", "flatbuffers")
    model = trained.model
    arrays = named_weights(model)
    (folder / WEIGHTS).write_bytes(encode_weights(arrays))
    weights = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
    for name, length in (("prefill", PREFILL_TOKENS), ("decode", 1)):
        exported = _export(model, weights, length)
        (folder / f"{name}.bin").write_bytes(exported.serialize())
    state = _by_name(model.initial_state(1))
    write_example(trained, folder, README, "B", state, platforms=PLATFORMS)


def _by_name(state: ModelState) -> dict[str, jax.Array]:
    """Return the arrays by name, such as ``0.mixer``."""
    return {name.replace("/", "."): leaf for name, leaf in named_leaves(state).items()}


def _export(model: LanguageModel, weights: dict[str, Any], length: int) -> export.Exported:
    (batch,) = export.symbolic_shape("B")
    initial, config = model.initial_state(1), model.config
    state, structure = _by_name(initial), jax.tree.structure(initial)

    def run(
        weights: dict[str, jax.Array], arrays: dict[str, jax.Array], tokens: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = model_from_weights(config, weights, "weights")
        layers = jax.tree.unflatten(structure, [arrays[name] for name in state])
        logits, layers = model(tokens, layers)
        return logits, _by_name(layers)

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


load = ExportedModel
