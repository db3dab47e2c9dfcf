"""The gated delta rule: a recurrence that replaces what is stored at a key.

Per head, with state S in R^{K x V}, a decay e^l and a writing strength beta::

    S_t = e^{l_t} (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
    y_t = S_t^T q_t

(Gated DeltaNet: arXiv:2412.06464, eq. 10; column vectors here.) `scan` is the definition. By chunks
of C tokens (section 3.3 there; the WY representation of arXiv:2406.06484), with b the inclusive sum
of l from the start of a chunk, D_ij = e^{b_i - b_j} for j <= i, and A = beta_i (k_i . k_j) D_ij
below the diagonal::

    (I + A) U = beta v           N = U - W S           y = (q e^b)^T S + (q k^T * D) N
    (I + A) W = beta e^b k       S' = e^{b_C} S + (k e^{b_C - b})^T N

All but the products with S are computed for all chunks at once; no exponent is above 0.
"""

from typing import Any

import jax
import jax.numpy as jnp

from simplernn_jax.array_types import Keys, Queries, RecurrentState, SegmentIds, Values
from simplernn_jax.ops.checks import FLOATING, accumulator_dtype, check_array, check_segment_ids
from simplernn_jax.ops.primitive import vary_like
from simplernn_jax.ops.segments import segment_starts

METHODS = ("auto", "chunkwise", "scan")


def gated_delta_rule(
    q: Queries,
    k: Keys,
    v: Values,
    log_gate: Any,
    beta: Any,
    *,
    initial_state: RecurrentState | None = None,
    segment_ids: SegmentIds | None = None,
    method: str = "auto",
    chunk_size: int = 32,
) -> tuple[Values, RecurrentState]:
    """Compute the recurrence of the module's docstring.

    Args:
      q: queries ``[B, T, H, K]``, of any floating-point dtype; sums are float64 if one of the
        arrays is, else float32.
      k: keys ``[B, T, H, K]``. Stable if beta times the squared norm of k is at most 2.
      v: values ``[B, T, H, V]``.
      log_gate: logarithms of the decays ``[B, T, H]``, at most 0.
      beta: writing strengths ``[B, T, H]``.
      initial_state: ``[B, H, K, V]``, of the first token's segment; None starts from zero.
      segment_ids: ``[B, T]`` integers; where the id changes from one token to the next, the state
        is reset to zero.
      method: ``"chunkwise"``: matmuls over chunks of time. ``"scan"``: one token at a time.
        ``"auto"``: chunkwise, except for a single token.
      chunk_size: tokens per chunk, a power of two.

    Returns:
      ``(output, final_state)``: ``[B, T, H, V]`` in the dtype of v, and ``[B, H, K, V]`` in the
      accumulation dtype.

    Raises:
      ValueError: wrong ranks, shapes that do not fit together, or an unknown method.
      TypeError: wrong dtypes.
    """
    sizes = check_array("q", q, "B T H K")
    check_array("k", k, "B T H K", FLOATING, sizes)
    sizes = check_array("v", v, "B T H V", FLOATING, sizes)
    check_array("log_gate", log_gate, "B T H", FLOATING, sizes)
    check_array("beta", beta, "B T H", FLOATING, sizes)
    if initial_state is not None:
        check_array("initial_state", initial_state, "B H K V", FLOATING, sizes)
    check_segment_ids(segment_ids, sizes)
    if method not in METHODS:
        raise ValueError(f"method={method!r}: must be one of {', '.join(METHODS)}")
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size={chunk_size}: must be a power of two")
    dtype = accumulator_dtype(q, k, v, log_gate, beta)
    inputs: Any = tuple(jnp.asarray(x, dtype) for x in (q, k, v, log_gate, beta))
    if initial_state is None:
        initial_state = jnp.zeros((q.shape[0], q.shape[2], q.shape[3], v.shape[3]), dtype)
    state = vary_like(jnp.asarray(initial_state, dtype), *inputs)
    if 0 in (*q.shape, v.shape[-1]):
        return jnp.zeros_like(v), state
    reset = jnp.zeros(q.shape[:2], bool) if segment_ids is None else segment_starts(segment_ids)
    inputs = (*inputs, state, reset)
    if method == "scan" or (method == "auto" and q.shape[1] == 1):
        output, state = scan(*inputs)
    else:
        output, state = chunkwise(chunk_size, *inputs)
    return output.astype(v.dtype), state


def scan(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_gate: jax.Array,
    beta: jax.Array,
    state: RecurrentState,
    reset: jax.Array,
) -> tuple[jax.Array, RecurrentState]:
    """Compute the definition; `reset` ``[B, T]`` clears the state before a token."""

    def step(state: RecurrentState, token: Any) -> tuple[RecurrentState, jax.Array]:
        q, k, v, log_gate, beta, reset = token
        state = jnp.where(reset[:, None, None, None], 0, state)
        state = jnp.exp(log_gate)[..., None, None] * state
        new = beta[..., None] * (v - jnp.einsum("bhk,bhkv->bhv", k, state))
        state = state + k[..., None] * new[..., None, :]
        return state, jnp.einsum("bhk,bhkv->bhv", q, state)

    time_first = [jnp.moveaxis(x, 1, 0) for x in (q, k, v, log_gate, beta, reset)]
    state, output = jax.lax.scan(step, state, time_first)
    return jnp.moveaxis(output, 0, 1), state


def chunkwise(
    size: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_gate: jax.Array,
    beta: jax.Array,
    state: RecurrentState,
    reset: jax.Array,
) -> tuple[jax.Array, RecurrentState]:
    """Compute `scan` by chunks of `size` tokens."""
    length = q.shape[1]
    while size >= 2 * length:
        size //= 2
    log_gate = jnp.where(reset[..., None], 0, log_gate)  # nothing decays into a segment

    def chunks(x: jax.Array) -> jax.Array:
        """Pad and cut ``[B, T, ...]`` into ``[chunks, B, size, ...]``."""
        x = jnp.pad(x, ((0, 0), (0, -length % size), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    # Padding has beta = 0 and a gate of 1: it leaves the state as it is.
    parts = _within(*map(chunks, (q, k, v, log_gate, beta, reset)))

    def step(state: RecurrentState, chunk: Any) -> tuple[RecurrentState, jax.Array]:
        q, k, attention, u, w, total = chunk
        new = u - w @ state
        return total * state + jnp.matrix_transpose(k) @ new, q @ state + attention @ new

    state, output = jax.lax.scan(step, state, parts)
    output = jnp.moveaxis(output, (0, 2), (1, 3))  # [B, chunks, size, H, V]
    return output.reshape(output.shape[0], -1, *output.shape[3:])[:, :length], state


@jax.checkpoint  # little is saved, and recomputing it is a small part of the gradient
def _within(
    q: jax.Array, k: jax.Array, v: jax.Array, log_gate: jax.Array, beta: jax.Array, reset: jax.Array
) -> tuple[jax.Array, ...]:
    """Compute what does not depend on the states: decayed q and k, attention, U, W, e^{b_C}."""
    q, k, v = (jnp.moveaxis(x, 3, 2) for x in (q, k, v))  # [N, B, H, C, K or V]
    log_gate, beta = (jnp.moveaxis(x, 3, 2) for x in (log_gate, beta))
    segment = jnp.cumsum(reset, axis=2)[:, :, None]  # 0: of the state at the start
    is_same = segment[..., :, None] == segment[..., None, :]
    is_causal = is_same & jnp.tril(jnp.ones_like(is_same))
    # Sums of the gates between two tokens, not differences of sums, which would lose digits.
    is_after = jnp.tril(jnp.ones_like(is_causal), -1)
    between = jnp.cumsum(jnp.where(is_after, log_gate[..., :, None], 0), axis=-2)
    between = jnp.exp(jnp.where(is_causal, between, -jnp.inf))
    from_start = jnp.where(segment == 0, jnp.exp(jnp.cumsum(log_gate, axis=-1)), 0)[..., None]
    to_end = between[..., -1, :, None]
    keys = beta[..., None] * k
    below = jnp.tril((keys @ jnp.matrix_transpose(k)) * between, -1)
    rhs = jnp.concatenate([beta[..., None] * v, from_start * keys], axis=-1)
    u, w = jnp.split(_unit_lower_inverse(below) @ rhs, [v.shape[-1]], axis=-1)
    attention = (q @ jnp.matrix_transpose(k)) * between
    total = from_start[..., -1:, :]
    return from_start * q, to_end * k, attention, u, w, total


@jax.custom_vjp
def _unit_lower_inverse(below: jax.Array) -> jax.Array:
    """Return the inverse of I + A for A ``[..., C, C]`` zero above and on the diagonal.

    C is a power of two. Inverses of blocks of 1, 2, 4, ... on the diagonal, from
    ``[[P, 0], [Q, R]]^-1 = [[P^-1, 0], [-R^-1 Q P^-1, R^-1]]``. (JAX's batched triangular solver
    for CPUs hangs if two of them run at once: each waits for threads of one pool.)
    """
    size = below.shape[-1]
    inverse = jnp.ones((*below.shape[:-2], size, 1, 1), below.dtype)
    width = 1
    while width < size:
        pairs = size // (2 * width)
        blocks = below.reshape(*below.shape[:-2], pairs, 2, width, pairs, 2, width)
        corner = jnp.stack([blocks[..., i, 1, :, i, 0, :] for i in range(pairs)], axis=-3)
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        bottom = jnp.concatenate([-second @ corner @ first, second], axis=-1)
        inverse, width = jnp.concatenate([top, bottom], axis=-2), 2 * width
    return inverse[..., 0, :, :]


def _inverse_fwd(below: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse = _unit_lower_inverse(below)
    return inverse, inverse


def _inverse_bwd(inverse: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    transposed = jnp.matrix_transpose(inverse)
    return (jnp.tril(-transposed @ cotangent @ transposed, -1),)


_unit_lower_inverse.defvjp(_inverse_fwd, _inverse_bwd)
