"""The gated linear recurrence in float64 NumPy, with a bound of the error of float32.

The bound is the first-order rounding error analysis of the recurrence. Each quantity has three
parts: its value, its size (the same sum with absolute values), and the bound of its error in units
of `UNIT`. A sum of n terms in any order has at most an error of n units of its size. A term that
has passed through m gates has at most an error of m `GATE` units of its own size, so that the bound
grows with the tokens that the state remembers, and not with those that it has forgotten.
"""

from typing import Any, NamedTuple

import numpy as np

from simplernn_jax.ops.gated_linear_recurrence.intra_chunk import BLOCK

Array = np.ndarray[Any, np.dtype[Any]]

UNIT = 2.0**-24
"""Relative rounding error of float32."""
GATE = 3.0
"""Error of a gate in units: exp is accurate to one unit in the last place, which is two of these,
and its multiplication rounds once."""
FLOOR = -16.0
"""Log gates below it are computed as equal to it by ``"chunkwise"`` in float32."""
EXPONENT = 64.0
"""Largest exponent inside a block of ``"chunkwise"``: exp multiplies its rounding by it."""
TINY = 2.0**-126
"""Smallest normal number of float32: smaller ones may be computed as zero, gates too."""
LOST = TINY * np.exp(EXPONENT)
"""Largest q, k, and parts of their gradients, 7e-11, that ``"chunkwise"`` may lose: multiplied by a
factor of e^-64 they underflow before the other factor, e^64, restores them."""
UNDERFLOW = 1e-30
"""Absolute error where a state underflows: `TINY` times the factors that follow it, at most 1e7."""


class Inputs(NamedTuple):
    """Inputs of the recurrence, time first, and cotangents of its results, all float64."""

    q: Array
    k: Array
    v: Array
    log_gate: Array
    state: Array
    reset: Array
    d_output: Array
    d_state: Array


class Bounded(NamedTuple):
    """A result, and the largest error that float32 may have."""

    value: Array
    error: Array


def bounded_recurrence(
    inputs: Inputs, chunk_size: int | None, with_gradient: bool
) -> dict[str, Bounded]:
    """Compute the results of the recurrence and bound their errors.

    `chunk_size` is that of ``"chunkwise"``, None for methods that go from token to token.

    Returns:
      ``output``, ``final_state`` and, `with_gradient`, ``d_q``, ``d_k``, ``d_v``, ``d_log_gate``,
      ``d_initial_state``; those with an axis of time have it first.
    """
    length, key_dim, value_dim = len(inputs.q), inputs.q.shape[-1], inputs.v.shape[-1]
    # Chunks sum over their tokens, and multiply both factors of a decay.
    extra = 0.0 if chunk_size is None else chunk_size + 2 * EXPONENT
    lost = 0.0 if chunk_size is None else LOST / UNIT
    gates = np.exp(np.stack([inputs.log_gate] * 3)[..., None])
    gates[1:] = gates[0] if chunk_size is None else np.maximum(gates[0], np.exp(FLOOR))
    gates[2] *= GATE
    gates[2] += (gates[1] - gates[0] + TINY) / UNIT
    state, before, after = _parts(inputs.state), [], []
    output = np.empty((3, *inputs.v.shape))
    for t in range(length):
        state = np.where(_over_states(inputs.reset[t]), 0, state)
        if with_gradient:
            before.append(state)
        state = _add(_decay(state, gates[:, t]), inputs.k[t], inputs.v[t], lost)
        output[:, t] = _contract(state, inputs.q[t][..., None], -2, key_dim + extra, lost)
        if with_gradient:
            after.append(state)
    results = {"output": output, "final_state": _round(state, extra)}
    if with_gradient:
        terms = value_dim + extra
        d_q, d_k = np.empty((2, 3, *inputs.q.shape))
        d_v, d_log_gate, at_end = (np.empty((3, *x.shape)) for x in (inputs.v, inputs.q, inputs.q))
        d_state = _parts(inputs.d_state)
        for t in reversed(range(length)):
            d_output = inputs.d_output[t][..., None, :]
            at_end[:, t] = _multiply(d_state, after[t], terms)
            d_state = _add(d_state, inputs.q[t], inputs.d_output[t], lost)
            d_q[:, t] = _contract(after[t], d_output, -1, terms)
            d_k[:, t] = _contract(d_state, inputs.v[t][..., None, :], -1, terms)
            d_v[:, t] = _contract(d_state, inputs.k[t][..., None], -2, key_dim + extra, lost)
            product = _multiply(d_state, before[t], terms)
            d_log_gate[:, t] = _decay(product, gates[:, t, ..., 0])
            d_state = _decay(d_state, gates[:, t])
            d_state = np.where(_over_states(inputs.reset[t]), 0, d_state)
        if chunk_size is not None:
            d_q[2] += BLOCK * lost
            d_k[2] += BLOCK * lost
            d_log_gate[2] = _error_by_chunks(inputs, d_q, d_k, at_end[2], chunk_size)
        results |= {"d_q": d_q, "d_k": d_k, "d_v": d_v, "d_log_gate": d_log_gate}
        results["d_initial_state"] = _round(d_state, extra)
    return {name: Bounded(x[0], UNIT * x[2] + UNDERFLOW) for name, x in results.items()}


def _error_by_chunks(
    inputs: Inputs, d_q: Array, d_k: Array, at_end: Array, chunk_size: int
) -> Array:
    """Bound d_log_gate as ``"chunkwise"`` computes it: sums of q dq - k dk to the chunk's end."""
    error = np.empty_like(at_end)
    q, k = np.abs(inputs.q), np.abs(inputs.k)
    added = q * d_q[2] + k * d_k[2] + (chunk_size + 2) * (q * d_q[1] + k * d_k[1])
    for start in range(0, len(added), chunk_size):
        chunk = slice(start, start + chunk_size)
        sums = np.cumsum(added[chunk][::-1], axis=0)[::-1]
        error[chunk] = sums + at_end[chunk][-1]
    return error


def _parts(x: Array) -> Array:
    """Value, size and error of an input."""
    return np.stack([x, np.abs(x), np.zeros_like(x)])


def _round(x: Array, units: float) -> Array:
    """Add an error relative to the size."""
    return np.stack([x[0], x[1], x[2] + units * x[1]])


def _add(x: Array, factor: Array, other: Array, lost: float) -> Array:
    """Add an outer product, of which units of the first factor may be lost, and both roundings."""
    added = factor[..., None] * other[..., None, :]
    x[0] += added
    x[1] += np.abs(added)
    x[2] += x[1] + np.abs(added) + lost * np.abs(other)[..., None, :]
    return x


def _decay(x: Array, gate: Array) -> Array:
    """Multiply by a gate."""
    return np.stack([x[0] * gate[0], x[1] * gate[1], x[2] * gate[1] + x[1] * gate[2]])


def _contract(x: Array, y: Array, axis: int, terms: float, lost: float = 0.0) -> Array:
    """Sum ``x y`` over an axis; `y` is exact, but units of it may be lost."""
    product = x * np.stack([y, np.abs(y), np.abs(y)])
    product[2] += lost * x[1]
    return _round(np.sum(product, axis=axis), terms)


def _multiply(x: Array, y: Array, terms: float) -> Array:
    """Sum ``x y`` over the last axis."""
    sums = np.sum(np.stack([x[0] * y[0], x[1] * y[1], x[2] * y[1] + x[1] * y[2]]), axis=-1)
    return _round(sums, terms)


def _over_states(reset: Array) -> Array:
    return reset[:, None, None, None]
