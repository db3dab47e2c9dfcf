"""Causal softmax attention over a sliding window."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from simplernn_jax.array_types import (
    Activations,
    CachedKeys,
    CachedValues,
    LogicalAxes,
    Outputs,
    Positions,
    SegmentIds,
)
from simplernn_jax.config import ModelConfig
from simplernn_jax.errors import UserError
from simplernn_jax.models.mixers.multi_head import MultiHeadLayer, multi_head_options
from simplernn_jax.models.mixers.token_mixer import TokenMixer, register_mixer, reject_option
from simplernn_jax.ops.attention import apply_rope, attend, sliding_attention
from simplernn_jax.ops.checks import FLOATING, INTEGER, check_array, check_segment_ids
from simplernn_jax.ops.segments import segment_starts
from simplernn_jax.parallel.collectives import axis_size, broadcast_from_last
from simplernn_jax.parallel.mesh import AXES as MESH_AXES
from simplernn_jax.parallel.named_leaves import tuple_with_names
from simplernn_jax.parallel.sequence import AXIS, left_halo, segment_offset


@tuple_with_names
class KVCache(NamedTuple):
    """State of `Attention`: a ring buffer; all zeros is the empty cache.

    The token at position p of its segment is in slot p mod S, S being the number of slots; it
    overwrites a token that no later query attends to. Heads come before slots, the layout of a
    decode step's matmuls.
    """

    keys: CachedKeys
    """Keys after rotation, in the compute dtype."""
    values: CachedValues
    """Values, in the compute dtype."""
    length: Int[Array, "B"]
    """Number of tokens of the current segment so far; int32."""


class Attention(MultiHeadLayer, TokenMixer):
    """Softmax attention over the last `context` tokens of the segment, the current one included.

    Per head, with K = key_dim / num_heads and V = value_dim / num_heads::

        q = R_t (W_q x + b_q)     k = R_t (W_k x + b_k)     v = W_v x + b_v
        y_t = sum_j softmax_j(q_t . k_j / sqrt(K)) v_j      for max(0, t - context + 1) <= j <= t

    followed by the output norm, gate and projection of `MultiHeadLayer`. R_t rotates pairs of
    channels by angles proportional to t (rotary position embedding, arXiv:2104.09864).
    """

    starts_from_zero = True

    def __init__(
        self,
        hidden_dim: int,
        key_dim: int,
        value_dim: int,
        output_dim: int,
        num_heads: int = 1,
        *,
        context: int,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        **options: Any,
    ):
        """Initialize the projections.

        Args:
          hidden_dim, key_dim, value_dim, output_dim, num_heads, rngs: see the base class.
          context: sliding-window size in tokens; also the number of cache slots.
          dtype: compute dtype of projections, queries, keys and values.
          **options: ``kernel_init``, ``output_norm`` and ``output_gate`` of the base class.

        Raises:
          ValueError: num_heads does not divide key_dim and value_dim.
        """
        sizes = (hidden_dim, key_dim, value_dim, output_dim, num_heads)
        super().__init__(*sizes, rngs=rngs, forget_gate=False, dtype=dtype, **options)
        self.context = context
        self.dtype = dtype

    def initial_state(self, batch_size: int) -> KVCache:
        """Return zeros ``[B, H, S, K or V]`` in the compute dtype, and `length` ``[B]`` int32."""
        slots = (batch_size, self.num_heads, self.context)
        return KVCache(
            jnp.zeros((*slots, self.key_dim // self.num_heads), self.dtype),
            jnp.zeros((*slots, self.value_dim // self.num_heads), self.dtype),
            jnp.zeros(batch_size, jnp.int32),
        )

    def state_axes(self) -> KVCache:
        """Return the logical axes of the arrays of a cache."""
        by_head: Any = LogicalAxes("batch", "heads")
        length: Any = LogicalAxes("batch")
        return KVCache(by_head, by_head, length)

    def __call__(
        self, x: Activations, state: KVCache | None = None, segment_ids: SegmentIds | None = None
    ) -> tuple[Outputs, KVCache]:
        """Apply the layer to a sequence: ``[B, T, hidden_dim]`` to ``[B, T, output_dim]``.

        See `TokenMixer`; None is the empty cache.

        Raises:
          ValueError: wrong ranks, or shapes inconsistent with each other or with this layer.
          TypeError: wrong dtypes, or a state that is not a `KVCache`.
        """
        sizes = check_array("x", x, "B T D", FLOATING, {"D": self.query_proj.in_features})
        check_segment_ids(segment_ids, sizes)
        batch, length = x.shape[:2]
        (q, k, v), output_gate = self.project_inputs(x)
        if state is not None:
            self._check_cache(state, {"B": batch, "H": q.shape[2], "K": q.shape[3]})
        if not length:
            y = jnp.zeros((batch, 0, self.num_heads, self.value_dim // self.num_heads), self.dtype)
            state = self.initial_state(batch) if state is None else state
            return self.project_outputs(y, output_gate), state
        before = segment_offset(length, None if state is None else state.length, segment_ids)
        positions = _positions(length, before, segment_ids)
        q, k = apply_rope(q, positions), apply_rope(k, positions)
        q, k, v = q.astype(self.dtype), k.astype(self.dtype), v.astype(self.dtype)
        if state is not None and length == 1 and axis_size(AXIS) == 1:
            state = _append_token(state, k, v)
            filled = jnp.arange(self.context, dtype=jnp.int32)[None] < state.length[:, None]
            k, v = (jnp.swapaxes(cached, 1, 2) for cached in (state.keys, state.values))
            y = attend(q, k, v, filled[:, None])
        else:
            past_k, past_v = (None, None) if state is None else cached_in_order(state)
            k = _concatenate(left_halo(k, past_k, self.context), k)
            v = _concatenate(left_halo(v, past_v, self.context), v)
            visible = jnp.minimum(positions + 1, self.context)
            y = sliding_attention(q, k, v, visible, self.context)
            cache = _build_cache(k, v, positions[:, -1] + 1, self.context)
            state = broadcast_from_last(cache, AXIS)
        return self.project_outputs(y, output_gate), state

    def _check_cache(self, state: Any, sizes: dict[str, Any]) -> None:
        if not isinstance(state, KVCache):
            raise TypeError(f"state: expected a KVCache; got {type(state).__name__}")
        sizes = {**sizes, "S": self.context, "V": self.value_dim // self.num_heads}
        dtypes = (str(jnp.dtype(self.dtype)),)
        check_array("state.keys", state.keys, "B H S K", dtypes, sizes)
        check_array("state.values", state.values, "B H S V", dtypes, sizes)
        check_array("state.length", state.length, "B", INTEGER, sizes)


def _check(config: ModelConfig) -> None:
    if not 1 <= (context := int(config.mixer_options["context"])) < 2**31:
        reject_option("context", context, "at least 1 and below 2**31")
    check_rotary(config)


def check_rotary(config: ModelConfig) -> None:
    """Raise `UserError` if a head has an odd number of key channels."""
    if config.key_dim // config.num_heads % 2:
        raise UserError(
            f"config.model.key_dim={config.key_dim} is invalid: expected an even number for each "
            f"of model.num_heads={config.num_heads}: the rotary embedding takes pairs of channels"
        )


@register_mixer("attention", options={"context": 1024}, mesh_axes=MESH_AXES, check=_check)
def attention(config: ModelConfig, *, rngs: nnx.Rngs) -> Attention:
    """Return the attention of a model; its option ``context`` is the sliding window in tokens."""
    context = int(config.mixer_options["context"])
    return Attention(context=context, rngs=rngs, **multi_head_options(config))


def _positions(
    length: int, before: Int[Array, "B"] | None, segment_ids: SegmentIds | None
) -> Positions:
    """Return ``[B, T]`` int32, or ``[1, T]`` if all sequences have the same positions."""
    offsets = jnp.arange(length, dtype=jnp.int32)[None]
    positions = offsets if before is None else before[:, None] + offsets
    if segment_ids is None:
        return positions
    start = jax.lax.cummax(jnp.where(segment_starts(segment_ids), offsets, -1), axis=1)
    return jnp.where(start < 0, positions, offsets - start)


def _append_token(state: KVCache, k: jax.Array, v: jax.Array) -> KVCache:
    """Append one token, ``[B, 1, H, K]`` and ``[B, 1, H, V]``, in its slot."""
    slot = state.length % state.keys.shape[2]

    @jax.vmap
    def put(cached: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(cached, new[:, None], slot, axis=1)

    return KVCache(
        put(state.keys, k[:, 0], slot), put(state.values, v[:, 0], slot), state.length + 1
    )


def cached_in_order(state: KVCache) -> tuple[jax.Array, jax.Array]:
    """Return the last S - 1 keys and values, oldest first; arbitrary where there are none."""
    slots = state.keys.shape[2]
    order = (state.length[:, None] + 1 + jnp.arange(slots - 1, dtype=jnp.int32)[None]) % slots
    k, v = (jnp.swapaxes(cached, 1, 2) for cached in (state.keys, state.values))
    return _gather(k, order), _gather(v, order)


def _build_cache(k: jax.Array, v: jax.Array, length: jax.Array, slots: int) -> KVCache:
    """Build the cache after the last keys and values of a sequence, ``[B, P + T, H, K or V]``.

    They hold at least the last `slots` tokens of the segment, or all of its `length` ``[B or 1]``
    tokens; P are tokens before this call.
    """
    length = jnp.broadcast_to(length, k.shape[:1])
    age = (length[:, None] - 1 - jnp.arange(slots, dtype=jnp.int32)[None]) % slots
    is_filled = (age < length[:, None])[..., None, None]
    index = jnp.maximum(k.shape[1] - 1 - age, 0)
    keys, values = (jnp.swapaxes(jnp.where(is_filled, _gather(x, index), 0), 1, 2) for x in (k, v))
    return KVCache(keys, values, length)


def _concatenate(past: jax.Array | None, x: jax.Array) -> jax.Array:
    return x if past is None else jnp.concatenate([past, x], axis=1)


def _gather(x: jax.Array, index: jax.Array) -> jax.Array:
    """Gather the tokens of ``[B, P + T, H, K or V]`` at ``[B, S]``."""
    return jnp.take_along_axis(x, index[..., None, None], axis=1)
