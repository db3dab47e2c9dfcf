"""Weights for decoding: quantized, or packed for the C function that prefills and decodes."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.errors import UserError
from simplernn_jax.inference.arguments import check_model
from simplernn_jax.models import LanguageModel
from simplernn_jax.ops.decode import DecoderWeights
from simplernn_jax.ops.native import supports_native
from simplernn_jax.ops.quantization import PANEL, PackedMatrix, pack, rounded
from simplernn_jax.ops.rms_norm import EPSILON

QUANTIZATIONS = ("none", "bfloat16", "int8", "int4")
"""Formats of weights: int8 with a scale for each output, int4 with one for 64 inputs of it."""


def quantize_model(model: LanguageModel, quantize: str) -> LanguageModel:
    """Round the matrices of a model, which `generate` and the server then decode in fewer bits.

    While decoding, everything else, including states and norms, is float32; products with int8 and
    int4 weights round their inputs to 16 bits. Evaluation computes with the same rounded weights in
    the model's own precision.

    Args:
      model: not modified.
      quantize: one of `QUANTIZATIONS`; ``none`` returns `model` itself.

    Raises:
      UserError: not a model, another value, or a model that is not decoded in fewer bits here: only
        parallel or residual blocks of SimpleRNN with a float32 state are, on one CPU device with a
        C compiler.
    """
    check_model(model)
    if quantize not in QUANTIZATIONS:
        raise UserError(f"quantize={quantize!r}: must be one of {', '.join(QUANTIZATIONS)}")
    if quantize == "none":
        return model
    if not decodes_natively(model):
        raise UserError(
            f"quantize={quantize}: only models of parallel or residual blocks with simple_rnn "
            "and a float32 state are quantized, on a single CPU device with a C compiler; use none"
        )
    result = nnx.clone(model)
    for _, part in nnx.iter_graph(result):
        if isinstance(part, nnx.Linear):
            part.kernel.set_value(_rounded(part.kernel[...], quantize))
    embedding = result.embedding.embedding  # [vocab, D]; a matrix [D, vocab] as a head
    embedding.set_value(_rounded(embedding[...].T, quantize).T)
    result.weight_format = quantize
    return result


_rounded = jax.jit(rounded, static_argnums=1)


def decodes_natively(model: LanguageModel) -> bool:
    """Return whether the C function decodes `model` here.

    It decodes parallel and residual blocks of SimpleRNN, on a single CPU device.
    """
    config, embedding = model.config, model.embedding.embedding[...]
    return (
        type(model) is LanguageModel
        and config.is_convolved
        and set(config.mixers) == {"simple_rnn"}
        and isinstance(model.layers, nnx.List)
        and config.norm_epsilon == EPSILON
        and not jax.config.jax_enable_x64  # type: ignore[attr-defined, unused-ignore]
        and isinstance(embedding, jax.Array)
        and not isinstance(embedding, jax.core.Tracer)
        and len(embedding.sharding.device_set) == 1
        and supports_native(jnp.float32)
    )


def weight_format(model: LanguageModel) -> str:
    """Return the format of the weights of a model: its precision unless `quantize_model` made it.

    The C function does not round activations to bfloat16, unlike other programs.
    """
    return getattr(model, "weight_format", model.config.precision)


def decoder_weights(model: LanguageModel, kind: str) -> DecoderWeights:
    """Pack the weights of `model`, which `decodes_natively`, in one of `quantization.FORMATS`."""
    layers: Any = model.layers
    cells = [layer.mixer.cell for layer in layers]

    def stacked(linears: list[nnx.Linear]) -> PackedMatrix:
        return pack(jnp.stack([linear.kernel[...] for linear in linears]), kind)

    embedding = pack(model.embedding.embedding[...].T, kind)
    head, head_bias = embedding, jnp.zeros(model.config.vocab_size)
    if model.head is not None:
        head, head_bias = pack(model.head.kernel[...], kind), _bias(model.head)
    assert model.final_scale is not None
    in_proj, bias = zip(*(_in_projection(cell) for cell in cells), strict=True)
    padding, mlp_padding = -bias[0].shape[0] % PANEL, -model.config.mlp_dim % PANEL
    mlp_out = jnp.stack([layer.mlp_out.kernel[...] for layer in layers])
    queries = jnp.full(cells[0].key_dim, cells[0].query_scale)
    scale = jnp.ones(bias[0].shape[0]).at[: queries.shape[0]].set(queries)
    return DecoderWeights(
        embedding=embedding,
        in_proj=pack(jnp.stack(in_proj), kind, scale),
        out_proj=stacked([cell.out_proj for cell in cells]),
        mlp_in=stacked([layer.mlp_in for layer in layers]),
        mlp_out=pack(jnp.pad(mlp_out, [(0, 0), (0, mlp_padding), (0, 0)]), kind),
        head=head,
        convolution=jnp.stack([layer.convolution.weights[...] for layer in layers]),
        bias=jnp.pad(jnp.stack(bias), [(0, 0), (0, padding)]),
        final_scale=model.final_scale[...],
        head_bias=head_bias,
        parallel=jnp.full(1, float(model.config.block == "parallel")),
    )


def _in_projection(cell: Any) -> tuple[jax.Array, jax.Array]:
    """Concatenate the input projections of a cell, and their biases, which follow their scale."""
    kernels = [linear.kernel[...] for linear in cell.input_projections]
    biases = [_bias(linear) for linear in cell.input_projections]
    biases[0] = biases[0] * cell.query_scale
    return jnp.concatenate(kernels, axis=1), jnp.concatenate(biases)


def _bias(linear: nnx.Linear) -> jax.Array:
    return jnp.zeros(linear.out_features) if linear.bias is None else linear.bias[...]
