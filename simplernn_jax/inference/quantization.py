"""Quantization of the weights of a model for decoding."""

import jax
from flax import nnx

from simplernn_jax.errors import UserError
from simplernn_jax.inference.arguments import check_model
from simplernn_jax.inference.decoder_weights import decodes_natively
from simplernn_jax.models import LanguageModel
from simplernn_jax.ops.quantization import rounded

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
        residual blocks of SimpleRNN with a float32 state are, on one CPU device with a C compiler.
    """
    check_model(model)
    if quantize not in QUANTIZATIONS:
        raise UserError(f"quantize={quantize!r}: must be one of {', '.join(QUANTIZATIONS)}")
    if quantize == "none":
        return model
    if not decodes_natively(model):
        raise UserError(
            f"quantize={quantize}: only models of residual blocks with simple_rnn and a float32 "
            "state are quantized, on a single CPU device with a C compiler; use none"
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
