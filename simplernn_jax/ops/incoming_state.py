"""Effect of the state before a sequence shard on its outputs and on its final state.

With b_i the inclusive sum of the log gates from the shard's start, and S_in the state before it, ::

    y_i = (y_i from a zero state) + (q_i e^{b_i})^T S_in
    S_out = diag(e^{b_T}) S_in + (S_out from a zero state)

Only tokens before the shard's first reset read S_in: `before_reset` ``[B, T]`` bool marks them;
None is all of them. Results have the dtype of log_gate, that of the state.
"""

import jax
import jax.numpy as jnp

BeforeReset = jax.Array | None


def shard_decay(log_gate: jax.Array, before_reset: BeforeReset) -> jax.Array:
    """Compute e^{b_T} ``[B, H, K]``, zero where the shard resets the state."""
    decay = jnp.exp(jnp.sum(log_gate, axis=1))
    return decay if before_reset is None else jnp.where(before_reset[:, -1, None, None], decay, 0)


def decayed_queries(q: jax.Array, log_gate: jax.Array, before_reset: BeforeReset) -> jax.Array:
    """Compute ``q_i e^{b_i}`` ``[B, T, H, K]`` at the tokens that read S_in, zero elsewhere."""

    def masked(x: jax.Array) -> jax.Array:
        return x if before_reset is None else jnp.where(before_reset[..., None, None], x, 0)

    return masked(q.astype(log_gate.dtype) * jnp.exp(jnp.cumsum(masked(log_gate), axis=1)))


def read_state(
    q: jax.Array, log_gate: jax.Array, before_reset: BeforeReset, incoming: jax.Array
) -> jax.Array:
    """Compute ``(q_i e^{b_i})^T S_in`` ``[B, T, H, V]``."""
    y = jnp.einsum("bthk,bhkv->bthv", decayed_queries(q, log_gate, before_reset), incoming)
    return y if before_reset is None else jnp.where(before_reset[..., None, None], y, 0)
