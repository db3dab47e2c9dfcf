"""The definition of the recurrence: one `jax.lax.scan` step per token.

Per head, with state S in R^{K x V}::

    S_t = diag(exp(log_gate_t)) S_{t-1} + k_t v_t^T
    y_t = S_t^T q_t

(Gated linear attention: arXiv:2312.06635, eq. 3; column vectors here, row vectors there.) Every
other implementation is tested against this one: output, final state and gradients.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import RecurrentState
from simplernn_jax.ops.checks import FLOATING, check_array


class RecurrenceInputs(NamedTuple):
    """Arguments of the recurrence."""

    q: jax.Array  # [B, T, H, K]
    k: jax.Array  # [B, T, H, K]
    v: jax.Array  # [B, T, H, V]
    log_gate: jax.Array  # [B, T, H, K]
    state: RecurrentState  # [B, H, K, V] before the first token, in the accumulation dtype
    reset: jax.Array | None = None  # [B, T] bool: the state is reset before the token

    def arrays(self) -> list[jax.Array]:
        """List the arrays that are not None."""
        return [x for x in self if x is not None]


def recurrent_step(
    q: jax.Array, k: jax.Array, v: jax.Array, log_gate: jax.Array, state: RecurrentState
) -> tuple[jax.Array, RecurrentState]:
    """Compute one token of the recurrence.

    Args:
      q: ``[B, H, K]``.
      k: ``[B, H, K]``.
      v: ``[B, H, V]``.
      log_gate: ``[B, H, K]``, at most 0.
      state: ``[B, H, K, V]``; its dtype is used for the computation.

    Returns:
      The output ``[B, H, V]`` in the dtype of v, and the next state in the dtype of `state`.

    Raises:
      ValueError: wrong ranks, shapes that do not fit together, or a `log_gate` above 0, if it is
        not traced.
      TypeError: wrong dtypes.
    """
    sizes = check_array("q", q, "B H K")
    check_array("k", k, "B H K", FLOATING, sizes)
    sizes = check_array("v", v, "B H V", FLOATING, sizes)
    check_array("log_gate", log_gate, "B H K", FLOATING, sizes)
    check_array("state", state, "B H K V", FLOATING, sizes)
    check_log_gate(log_gate)
    dtype = state.dtype
    gate = jnp.exp(log_gate.astype(dtype))
    state = gate[..., None] * state + k.astype(dtype)[..., None] * v.astype(dtype)[..., None, :]
    output = jnp.sum(q.astype(dtype)[..., None] * state, axis=-2)
    return output.astype(v.dtype), state


def check_log_gate(log_gate: jax.Array) -> None:
    """Raise ValueError if `log_gate` is above 0 anywhere; a traced array is not read."""
    if isinstance(log_gate, jax.core.Tracer) or not log_gate.size:
        return
    if (largest := float(jnp.max(log_gate))) > 0:
        raise ValueError(f"log_gate must be <= 0, got {largest:.3g}: pass log(gate)")


def scan(inputs: RecurrenceInputs) -> tuple[jax.Array, RecurrentState]:
    """Compute the output ``[B, T, H, V]`` and the final state ``[B, H, K, V]``."""

    def step(state: RecurrentState, token: Any) -> tuple[RecurrentState, jax.Array]:
        q, k, v, log_gate, reset = token
        if reset is not None:
            state = jnp.where(reset[:, None, None, None], 0, state)
        output, state = recurrent_step(q, k, v, log_gate, state)
        return state, output

    time_first = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (*inputs[:4], inputs.reset))
    final_state, output = jax.lax.scan(step, inputs.state, time_first)
    return jnp.moveaxis(output, 0, 1), final_state
