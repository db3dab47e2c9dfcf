"""A causal convolution over the last few tokens, channel by channel, with a state to go on from."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.array_types import Activations, RecentInputs, SegmentIds
from simplernn_jax.parallel.collectives import axis_size, from_last
from simplernn_jax.parallel.sequence import halo


def _starts_as_identity(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    del key
    return jnp.zeros(shape, dtype).at[0].set(1)


class ShortConvolution(nnx.Module):
    """``y_t = sum_n w_n * x_{t-n}`` for n in 0 .. width - 1, within one segment.

    It lets a token see its neighbours before it asks the recurrence, as in Mamba
    (arXiv:2312.00752, section 3.4). It starts as the identity. All float32.
    """

    def __init__(self, width: int, features: int, *, rngs: nnx.Rngs):
        """Makes the weights ``[width, features]``: how much of the input n tokens ago is taken."""
        self.width = width
        self.features = features
        self.weights = nnx.Param(_starts_as_identity(rngs.params(), (width, features)))

    def initial_state(self, batch_size: int) -> RecentInputs:
        """Zeros ``[B, width - 1, D]``, float32: nothing came before."""
        return jnp.zeros((batch_size, self.width - 1, self.features))

    def __call__(
        self, x: Activations, state: RecentInputs | None, segment_ids: SegmentIds | None
    ) -> tuple[Activations, RecentInputs]:
        """Convolves over time.

        Args:
          x: ``[B, T, D]``.
          state: the inputs before the first token, ``[B, width - 1, D]``; they belong to its
            segment. None is zeros.
          segment_ids: ``[B, T]``; nothing is taken from before a change of id.

        Returns:
          ``[B, T, D]`` and the state after the last token.
        """
        length, past = x.shape[1], self.width - 1
        if state is None:
            state = self.initial_state(x.shape[0])
        x = x.astype(state.dtype)
        reachable = None if segment_ids is None else _reachable(segment_ids, self.width)
        if axis_size("sequence") > 1:  # the tokens before are another device's
            state = halo(_of_last_segment(x[:, -past:], reachable), state, segment_ids)
        inputs = jnp.concatenate([state, x], axis=1)
        weights = self.weights[...][:, None, None]
        y = inputs[:, past:] * weights[0]
        for lag in range(1, self.width):
            earlier = inputs[:, past - lag : past - lag + length]
            if reachable is not None:
                earlier = jnp.where(reachable[lag][..., None], earlier, 0)
            y = y + earlier * weights[lag]
        return y, from_last(_of_last_segment(inputs[:, length:], reachable), "sequence")


def _of_last_segment(recent: RecentInputs, reachable: list[jax.Array] | None) -> RecentInputs:
    """The last inputs, zero where they are not of the last token's segment."""
    if reachable is None or not reachable[0].shape[1]:
        return recent
    lags = reversed(range(recent.shape[1]))
    kept = jnp.stack([reachable[lag][:, -1] for lag in lags], axis=1)
    return jnp.where(kept[..., None], recent, 0)


def _reachable(segment_ids: SegmentIds, width: int) -> list[jax.Array]:
    """By lag, ``[B, T]``: whether the token so many before is of the same segment."""
    same = jnp.pad(
        segment_ids[:, 1:] == segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True
    )
    reachable = [jnp.ones_like(same)]
    for lag in range(1, width):
        before = jnp.pad(same, ((0, 0), (lag - 1, 0)), constant_values=True)[:, : same.shape[1]]
        reachable.append(reachable[-1] & before)
    return reachable
