"""What a layer sees of the last few tokens: normalised, and mixed channel by channel."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.array_types import Activations, ConvState, SegmentIds
from simplernn_jax.ops import segment_starts
from simplernn_jax.ops.checks import FLOATING, check_array, check_segment_ids
from simplernn_jax.ops.rms_norm import rms_norm
from simplernn_jax.ops.rms_norm_convolution import rms_norm_convolution
from simplernn_jax.sharding.collectives import axis_size, broadcast_from_last
from simplernn_jax.sharding.sequence_parallel import halo


def _starts_as_identity(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    del key
    return jnp.zeros(shape, dtype).at[0].set(1)


class ShortConvolution(nnx.Module):
    """``y_t = sum_n w_n * norm(x_{t-n})`` for n in 0 .. width - 1, within one segment.

    It lets a token see its neighbours before it asks the recurrence, as in Mamba
    (arXiv:2312.00752, section 3.4). The norm is `rms_norm`. It starts as the norm alone. All
    float32.
    """

    def __init__(self, width: int, features: int, *, rngs: nnx.Rngs):
        """Makes the weights ``[width, features]``: how much of the input n tokens ago is taken."""
        self.width = width
        self.features = features
        self.weights = nnx.Param(_starts_as_identity(rngs.params(), (width, features)))

    def initial_state(self, batch_size: int) -> ConvState:
        """Zeros ``[B, width - 1, D]``, float32: nothing came before."""
        return jnp.zeros((batch_size, self.width - 1, self.features))

    def __call__(
        self, x: Activations, state: ConvState | None, segment_ids: SegmentIds | None
    ) -> tuple[Activations, ConvState]:
        """Normalises, then convolves over time.

        Args:
          x: ``[B, T, D]``.
          state: the normalised inputs before the first token, ``[B, width - 1, D]``; they belong
            to its segment. None is zeros.
          segment_ids: ``[B, T]``; nothing is taken from before a change of id.

        Returns:
          ``[B, T, D]`` and the state after the last token.

        Raises:
          ValueError: wrong ranks, or shapes that do not fit together or this layer.
          TypeError: wrong dtypes.
        """
        past = self.width - 1
        sizes = check_array("x", x, "B T D", FLOATING, {"D": self.features, "P": past})
        check_segment_ids(segment_ids, sizes)
        if state is not None:
            check_array("state", state, "B P D", FLOATING, sizes)
        if state is None:
            state = self.initial_state(x.shape[0])
        starts = None if segment_ids is None else segment_starts(segment_ids)
        if axis_size("sequence") > 1:  # the tokens before are another device's
            own = rms_norm(x[:, -past:].astype(state.dtype))
            state = halo(_of_last_segment(own, starts), state, segment_ids)
        y, recent = rms_norm_convolution(x, self.weights[...], state, starts)
        return y, broadcast_from_last(_of_last_segment(recent, starts), "sequence")


def _of_last_segment(recent: ConvState, starts: jax.Array | None) -> ConvState:
    """The inputs until the last token, zero where they are not of its segment."""
    if starts is None:
        return recent
    late = jnp.pad(starts, ((0, 0), (recent.shape[1], 0)))[:, starts.shape[1] :].astype(jnp.int32)
    starts_after = jnp.flip(jnp.cumsum(jnp.flip(late, 1), axis=1), 1) - late
    return jnp.where(starts_after[..., None] > 0, 0, recent)
