"""Short depthwise causal convolutions over time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.array_types import Activations, ConvState, LogicalAxes, SegmentIds
from simplernn_jax.models.layers import PARAM_DTYPE
from simplernn_jax.ops.checks import FLOATING, accumulator_dtype, check_array, check_segment_ids
from simplernn_jax.parallel.sequence import sharded_convolution


def _identity_init(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.zeros(shape, dtype).at[0].set(1)


class ShortConvolution(nnx.Module):
    """``y_t = f(sum_n w_n x_{t-n})`` for n in 0 .. width - 1, within one segment; all float32.

    Initialized so that the convolution is the identity: ``w_0`` is 1, the rest 0. The residual
    block normalizes the inputs and has no f; unlike in Mamba (arXiv:2312.00752, section 3.4), its
    convolution precedes the input projections.
    """

    def __init__(
        self,
        width: int,
        features: int,
        *,
        rngs: nnx.Rngs,
        normalize: bool = False,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        axis: str | None = None,
    ):
        """Initialize ``weights[n]``, which multiplies the input n tokens earlier.

        Args:
          width: W, tokens that a result depends on, the current one included.
          features: channels.
          rngs: source of initial values.
          normalize: apply `rms_norm` to the inputs first.
          activation: f; None is the identity.
          axis: logical axis of the channels.
        """
        self.width, self.features = width, features
        self.normalize, self.activation = normalize, activation
        self.channel_axes = () if axis is None else (None, axis)
        weights = _identity_init(rngs.params(), (width, features), PARAM_DTYPE)
        self.weights = nnx.Param(weights, axes=LogicalAxes(*self.channel_axes))

    def initial_state(self, batch_size: int) -> ConvState:
        """Return zeros ``[B, W - 1, D]``, float32 (float64 under x64)."""
        return jnp.zeros((batch_size, self.width - 1, self.features))

    def state_axes(self) -> LogicalAxes:
        """Return the logical axes of the state."""
        return LogicalAxes("batch", *self.channel_axes)

    def __call__(
        self, x: Activations, state: ConvState | None, segment_ids: SegmentIds | None
    ) -> tuple[Activations, ConvState]:
        """Convolve a sequence.

        Args:
          x: ``[B, T, D]``, with this device's channels.
          state: (normalized) inputs before the first token, of its segment, ``[B, W - 1, D]``; None
            starts from zeros.
          segment_ids: ``[B, T]``; inputs of other segments count as zero.

        Returns:
          ``[B, T, D]`` and the state after the last token, in the dtype of `state`, float32
          (float64 under x64) without one.

        Raises:
          ValueError: wrong ranks, or shapes inconsistent with each other or with this layer.
          TypeError: wrong dtypes.
        """
        known: dict[str, Any] = {"P": self.width - 1}
        if not self.channel_axes:  # else the mesh may shard the channels
            known["D"] = self.features
        sizes = check_array("x", x, "B T D", FLOATING, known)
        check_segment_ids(segment_ids, sizes)
        if state is None:
            state = jnp.zeros((x.shape[0], self.width - 1, x.shape[2]))
        check_array("state", state, "B P D", FLOATING, sizes)
        weights = self.weights[...]
        weights = weights.astype(accumulator_dtype(weights, state))  # a state under x64 is float64
        y, state = sharded_convolution(x, weights, state, segment_ids, normalize=self.normalize)
        return y if self.activation is None else self.activation(y), state
