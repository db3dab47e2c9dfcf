"""Depthwise causal convolutions of queries, keys and values."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.array_types import Activations, ConvState, LogicalAxes, SegmentIds
from simplernn_jax.models.dense import PARAM_DTYPE
from simplernn_jax.named_leaves import tuple_with_names
from simplernn_jax.ops.checks import accumulator_dtype
from simplernn_jax.parallel.sequence import sharded_convolution


@tuple_with_names
class QKVConvStates(NamedTuple):
    """Last inputs of the convolutions of one layer, or the logical axes of these arrays.

    Arrays are float32 (float64 under x64) ``[B, width - 1, channels]``, with the channels of all
    heads.
    """

    query: ConvState
    key: ConvState
    value: ConvState


class CausalConvolution(nnx.Module):
    """``silu(sum_n w_n x_{t-n})`` for n in 0 .. width - 1, within one segment; float32.

    Initialized so that the convolution before the silu is the identity: ``w_0`` is 1, the rest 0.
    """

    def __init__(self, width: int, features: int):
        """Initialize ``weights[n]``, which multiplies the input n tokens earlier."""
        self.width = width
        self.features = features
        weights = jnp.zeros((width, features), PARAM_DTYPE).at[0].set(1)
        self.weights = nnx.Param(weights, axes=LogicalAxes(None, "heads"))

    def initial_state(self, batch_size: int) -> ConvState:
        """Return zeros ``[B, width - 1, channels]``, float32 (float64 under x64)."""
        return jnp.zeros((batch_size, self.width - 1, self.features))

    def __call__(
        self, x: Activations, state: ConvState | None, segment_ids: SegmentIds | None
    ) -> tuple[Activations, ConvState]:
        """Convolve a sequence.

        Args:
          x: ``[B, T, channels]``.
          state: inputs before the first token, ``[B, width - 1, channels]``; None starts from
            zeros.
          segment_ids: ``[B, T]``; inputs of other segments count as zero.

        Returns:
          ``[B, T, channels]`` and the state after the last token, in the dtype of `state`,
          float32 without one.

        Raises:
          ValueError: shapes inconsistent with each other or with this layer.
          TypeError: wrong dtypes.
        """
        weights = self.weights[...]
        if state is None:  # of this device's channels
            state = jnp.zeros((x.shape[0], self.width - 1, x.shape[2]), weights.dtype)
        weights = weights.astype(accumulator_dtype(weights, state))
        y, state = sharded_convolution(x, weights, state, segment_ids, normalize=False)
        return jax.nn.silu(y), state


class QKVConvolutions(nnx.Module):
    """One `CausalConvolution` each for the heads' queries, keys and values."""

    def __init__(self, width: int, key_dim: int, value_dim: int):
        """Initialize the convolutions of `width` tokens."""
        self.query = CausalConvolution(width, key_dim)
        self.key = CausalConvolution(width, key_dim)
        self.value = CausalConvolution(width, value_dim)

    def initial_state(self, batch_size: int) -> QKVConvStates:
        """Return zeros, ``[B, width - 1, channels]`` each."""
        return QKVConvStates(*(conv.initial_state(batch_size) for conv in self._all()))

    def state_axes(self) -> QKVConvStates:
        """Return the logical axes of the state."""
        axes: Any = LogicalAxes("batch", None, "heads")
        return QKVConvStates(axes, axes, axes)

    def __call__(
        self,
        heads: tuple[jax.Array, ...],
        state: QKVConvStates | None,
        segment_ids: SegmentIds | None,
    ) -> tuple[tuple[jax.Array, ...], QKVConvStates]:
        """Convolve queries, keys and values over time, each as `CausalConvolution`.

        Args:
          heads: (q, k, v), ``[B, T, H, K or V]`` each.
          state: inputs before the first token, ``[B, width - 1, H * K or H * V]`` each; None starts
            from zeros.
          segment_ids: ``[B, T]``; inputs of other segments count as zero.

        Returns:
          The three results, ``[B, T, H, K or V]``, and the states after the last token.

        Raises:
          ValueError: shapes inconsistent with each other or with this layer.
          TypeError: wrong dtypes.
        """
        states = (None, None, None) if state is None else state
        outputs, finals = [], []
        for conv, x, before in zip(self._all(), heads, states, strict=True):
            merged = x.reshape(*x.shape[:2], x.shape[2] * x.shape[3])
            y, final = conv(merged, before, segment_ids)
            outputs.append(y.reshape(x.shape))
            finals.append(final)
        return tuple(outputs), QKVConvStates(*finals)

    def _all(self) -> tuple[CausalConvolution, ...]:
        return self.query, self.key, self.value
