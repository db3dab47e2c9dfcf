"""Depthwise causal convolution of RMS-normalized inputs."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.array_types import Activations, ConvState, LogicalAxes, SegmentIds
from simplernn_jax.ops.checks import FLOATING, accumulator_dtype, check_array, check_segment_ids
from simplernn_jax.parallel.sequence import sharded_convolution


def _identity_init(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.zeros(shape, dtype).at[0].set(1)


class ShortConvolution(nnx.Module):
    """``y_t = sum_n w_n * norm(x_{t-n})`` for n in 0 .. width - 1, within one segment.

    Depthwise causal convolution. Unlike Mamba's (arXiv:2312.00752, section 3.4), it precedes the
    input projections and has no activation. The norm is `rms_norm`; initially the layer is the norm
    alone. All float32.
    """

    def __init__(self, width: int, features: int, *, rngs: nnx.Rngs):
        """Initialize the weights; ``weights[n]`` multiplies the input n tokens earlier."""
        self.width = width
        self.features = features
        self.weights = nnx.Param(_identity_init(rngs.params(), (width, features)))

    def initial_state(self, batch_size: int) -> ConvState:
        """Return zeros ``[B, width - 1, D]``, float32 (float64 under x64)."""
        return jnp.zeros((batch_size, self.width - 1, self.features))

    def state_axes(self) -> LogicalAxes:
        """Return the logical axes of the state."""
        return LogicalAxes("batch")

    def __call__(
        self, x: Activations, state: ConvState | None, segment_ids: SegmentIds | None
    ) -> tuple[Activations, ConvState]:
        """Normalize, then convolve over time.

        Args:
          x: ``[B, T, D]``.
          state: normalized inputs before the first token, of its segment, ``[B, width - 1, D]``;
            None starts from zeros.
          segment_ids: ``[B, T]``; inputs of other segments count as zero.

        Returns:
          ``[B, T, D]`` and the state after the last token, in the dtype of `state`, float32
          (float64 under x64) without one.

        Raises:
          ValueError: wrong ranks, or shapes inconsistent with each other or with this layer.
          TypeError: wrong dtypes.
        """
        past = self.width - 1
        sizes = check_array("x", x, "B T D", FLOATING, {"D": self.features, "P": past})
        check_segment_ids(segment_ids, sizes)
        if state is not None:
            check_array("state", state, "B P D", FLOATING, sizes)
        if state is None:
            state = self.initial_state(x.shape[0])
        weights = self.weights[...]
        weights = weights.astype(accumulator_dtype(weights, state))  # a state under x64 is float64
        return sharded_convolution(x, weights, state, segment_ids)
