"""Every method of the recurrence in float32, against float64, with a bound of its error.

The bound is the first-order rounding error analysis of the recurrence. Every result is a sum of
products of inputs and gates. Its size is the same sum with absolute values. A sum of n terms in any
order has at most an error of n units of its size. A term that has passed through m gates has at
most an error of m `GATE` units of its own size, and of one unit for each sum that it was part of
meanwhile, so that the bound grows with the tokens that the state remembers, and not with those that
it has forgotten: it is the derivative of the size for a relative change of each gate.
"""

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from simplernn_jax.ops import gated_linear_recurrence, recurrent_step
from simplernn_jax.ops.gated_linear_recurrence.chunkwise import choose_groups
from simplernn_jax.ops.gated_linear_recurrence.intra_chunk import BLOCK
from simplernn_jax.ops.native import supports_native

from .experiment import Case, experiment

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
    """Inputs of the recurrence, batch first, and cotangents of its results, all float64."""

    q: Array
    k: Array
    v: Array
    log_gate: Array
    initial_state: Array | None
    d_output: Array
    d_state: Array


def bounded_recurrence(
    inputs: Inputs, segment_ids: Array, chunk_size: int | None, with_gradient: bool
) -> dict[str, tuple[Array, Array]]:
    """Results of the recurrence by name, each with the largest error that float32 may have.

    `chunk_size` is that of ``"chunkwise"``, None for methods that go from token to token.
    """
    key_dim, value_dim = inputs.q.shape[-1], inputs.v.shape[-1]
    # Chunks sum over their tokens, and multiply both factors of a decay.
    extra = 0.0 if chunk_size is None else chunk_size + 2 * EXPONENT
    lost = 0.0 if chunk_size is None else LOST / UNIT
    raised = np.maximum(inputs.log_gate, np.log(TINY) if chunk_size is None else FLOOR)
    sizes = jax.tree.map(np.abs, inputs)._replace(log_gate=raised)
    change = (np.exp(raised) - np.exp(inputs.log_gate) + TINY) / np.exp(raised)
    errors = jax.tree.map(np.zeros_like, inputs)._replace(
        q=np.full_like(inputs.q, lost),
        k=np.full_like(inputs.k, lost),
        log_gate=GATE + 1 + change / UNIT,
    )
    with jax.enable_x64(True):
        found = _by_scan(inputs, sizes, errors, segment_ids, with_gradient)
        values, sizes_of, errors_of = jax.tree.map(np.asarray, found)
    # Terms of each sum; to add a product to a state rounds twice, and both have errors in the last.
    terms = {"output": key_dim, "final_state": 0, "d_q": value_dim, "d_k": value_dim}
    terms |= {"d_v": key_dim, "d_log_gate": value_dim + 2, "d_initial_state": 0}
    for name, size in sizes_of.items():
        errors_of[name] = errors_of[name] + (terms[name] + 2 + extra) * size
    if with_gradient and chunk_size is not None:
        errors_of["d_q"] += BLOCK * lost
        errors_of["d_k"] += BLOCK * lost
        at_end = errors_of["final_state"] + value_dim * sizes_of["final_state"]
        # The product of a state and its gradient is that of the next gate.
        last = np.sum(sizes.d_state * at_end, axis=-1)[:, None]
        after = np.concatenate([errors_of["d_log_gate"][:, 1:], last], axis=1)
        # Chunks sum q dq - k dk from their end.
        added = sum(
            factor * (errors_of[name] + (chunk_size + 2) * sizes_of[name])
            for factor, name in ((sizes.q, "d_q"), (sizes.k, "d_k"))
        )
        for start in range(0, added.shape[1], chunk_size):
            chunk = slice(start, start + chunk_size)
            sums = np.cumsum(added[:, chunk][:, ::-1], axis=1)[:, ::-1]
            errors_of["d_log_gate"][:, chunk] = sums + after[:, chunk][:, -1:]
    return {name: (value, UNIT * errors_of[name] + UNDERFLOW) for name, value in values.items()}


@functools.partial(jax.jit, static_argnames="with_gradient")
def _by_scan(inputs: Any, sizes: Any, errors: Any, segment_ids: Any, with_gradient: bool) -> Any:
    """Values, their sizes, and derivatives of the sizes along `errors`."""

    def call(x: Inputs) -> dict[str, Any]:
        return results(x, segment_ids, with_gradient, method="scan")

    return call(inputs), *jax.jvp(call, (sizes,), (errors,))


def results(inputs: Inputs, segment_ids: Any, with_gradient: bool, **options: Any) -> Any:
    """Results of `gated_linear_recurrence` with these options, by name."""

    def call(arrays: dict[str, Any]) -> Any:
        return gated_linear_recurrence(**arrays, segment_ids=segment_ids, **options)

    pairs = zip(Inputs._fields[:5], inputs[:5], strict=True)
    arrays = {name: array for name, array in pairs if array is not None}
    (output, state), pullback = jax.vjp(call, arrays)
    gradients = pullback((inputs.d_output, inputs.d_state))[0] if with_gradient else {}
    named = {f"d_{name}": gradient for name, gradient in gradients.items()}
    return {"output": output, "final_state": state, **named}


def by_steps(inputs: Inputs, _: Any) -> dict[str, Any]:
    """Output and final state by `recurrent_step`."""
    state, outputs = inputs.initial_state, []
    if state is None:
        state = np.zeros_like(inputs.d_state)
    for t in range(inputs.q.shape[1]):
        output, state = _step(*(x[:, t] for x in inputs[:4]), state)
        outputs.append(output)
    return {"output": np.stack(outputs, axis=1), "final_state": state}


_step = jax.jit(recurrent_step)

CASES_PER_PROGRAM = 5
"""Each shape and method compiles a program of its own, which takes longer than a case."""
CASES_PER_CACHE = 100
"""Compiled programs are forgotten after as many: 2 MB for each case otherwise."""
STEPS = "recurrent_step"
"""The method that computes one token per call."""
METHODS: dict[str, dict[str, Any]] = {
    "auto": {},
    "chunkwise": {"method": "chunkwise"},
    "chunks of 8": {"chunk_size": 8},
    "scan": {"method": "scan"},
    "chunks of 128": {"chunk_size": 128},
    STEPS: {},
}
"""Arguments of `gated_linear_recurrence`."""
SIZES = (1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 32, 37, 47, 64, 67, 101, 128)
"""Key and value sizes."""
MAX_LENGTH, MAX_STEPS = 100_000, 60
"""Tokens of a sequence, and of one that `recurrent_step` computes."""
MAX_STATES, MAX_KEPT = 2**23, 2**20
"""Entries of the states of all tokens, and of those that the reference keeps for a gradient."""
GATES = ("zero", "near zero", "strong", "all scales", "by channel", "rare", "smallest")
SEGMENTS = ("one", "random", "every token", "first token", "two ids")


class Program(NamedTuple):
    """Computation of one compiled program."""

    method: str
    batch: int
    length: int
    heads: int
    key_dim: int
    value_dim: int
    has_state: bool
    has_segments: bool
    has_gradient: bool


@experiment(full=2000, quick=30)
def numerics(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Results and gradients of the recurrence in float32 are within bounds of rounding errors."""
    methods = list(METHODS)
    for number in range(count):
        if number % CASES_PER_PROGRAM == 0:
            draw = np.random.default_rng([seed, number])
            method = methods[number // CASES_PER_PROGRAM % len(methods)]
            program = draw_program(draw, method)
            if number % CASES_PER_CACHE == 0:
                jax.clear_caches()
            given = {"with_gradient": program.has_gradient, **METHODS[method]}
            run = by_steps if method == STEPS else jax.jit(functools.partial(results, **given))
            kind = method if method != "auto" or supports_native(jnp.float32) else "chunkwise"
            chunk_size = METHODS[method].get("chunk_size")
            if kind == "chunkwise":
                chunk_size = choose_groups((1, program.length, 1, 1), 1).size
        draw = np.random.default_rng([seed, number, 1])
        gates, segments = draw.choice(GATES), draw.choice(SEGMENTS)
        case = draw_case(draw, program, gates)
        reset = draw_reset(draw, segments, program)
        segment_ids = np.cumsum(reset, axis=1, dtype=np.int32)
        expected = bounded_recurrence(case, segment_ids, chunk_size, program.has_gradient)
        single = jax.tree.map(np.float32, case)
        # An id that occurs again is another segment.
        found = run(single, segment_ids % 2 if program.has_segments else None)
        problem = compare(jax.tree.map(np.asarray, found), expected)
        yield Case(f"{number}, {program}, gates {gates}, segments {segments}", problem, kind)


def draw_program(draw: np.random.Generator, method: str) -> Program:
    """Draw a shape, most often of a short sequence."""
    is_sequence = method != STEPS
    length = round((MAX_LENGTH if is_sequence else MAX_STEPS) ** draw.random() ** 3)
    states = math.inf
    while states > max(MAX_STATES, length):
        batch, heads = (int(x) for x in draw.integers(1, 6, 2))
        key_dim, value_dim = (int(x) for x in draw.choice(SIZES, 2))
        states = batch * heads * key_dim * value_dim * length
    has_state, has_segments, has_gradient = (bool(draw.random() < p) for p in (0.7, 0.7, 0.6))
    sizes = (batch, length, heads, key_dim, value_dim, has_state)
    has_gradient &= is_sequence and states <= MAX_KEPT
    return Program(method, *sizes, is_sequence and has_segments, has_gradient)


def draw_case(draw: np.random.Generator, program: Program, gates: str) -> Inputs:
    """Draw float32 numbers of any scale, as float64, and log gates from -1e4 to 0."""
    _, batch, length, heads, key_dim, value_dim, *_ = program
    keys, values = (batch, length, heads, key_dim), (batch, length, heads, value_dim)
    state = (batch, heads, key_dim, value_dim)

    def normal(shape: tuple[int, ...]) -> Array:
        return 10 ** draw.uniform(-3, 3) * draw.normal(size=shape)

    def between(largest: float, smallest: float, shape: tuple[int, ...] = keys) -> Array:
        return -np.exp(draw.uniform(np.log(largest), np.log(smallest), shape))

    log_gates: dict[str, Callable[[], Array]] = {
        "zero": lambda: np.zeros(keys),
        "near zero": lambda: between(1e-9, 1e-2),
        "strong": lambda: between(1.0, 1e4),
        "all scales": lambda: between(1e-9, 1e4),
        "by channel": lambda: between(0.5, 2.0) * -between(1e-9, 5e3, keys[2:]),
        # A state of many tokens is forgotten at once.
        "rare": lambda: np.where(draw.random(keys) < 0.02, -1e4, between(1e-9, 1e-3)),
        "smallest": lambda: np.full(keys, -1e4),
    }
    case = Inputs(
        q=normal(keys),
        k=np.abs(normal(keys)) if draw.random() < 0.5 else normal(keys),
        v=normal(values),
        log_gate=log_gates[gates](),
        initial_state=normal(state) if program.has_state else None,
        d_output=normal(values),
        d_state=normal(state),
    )
    return jax.tree.map(lambda x: x.astype(np.float32).astype(float), case)


def draw_reset(draw: np.random.Generator, kind: str, program: Program) -> Array:
    """Draw the tokens that start a segment; the first continues that of the initial state."""
    shape = program.batch, program.length
    shares = {"random": 10 ** draw.uniform(-3, 0), "every token": 1.0, "two ids": 0.5}
    share = shares.get(kind, 0.0) if program.has_segments else 0.0
    reset = draw.random(shape) < share
    reset[:, 1:2] |= kind == "first token" and program.has_segments
    reset[:, 0] = False
    return reset


def compare(found: dict[str, Array], expected: dict[str, tuple[Array, Array]]) -> str | None:
    """Describe the first result that is not finite, or not within its bound."""
    for name, result in found.items():
        value, limit = expected[name]
        if result.dtype != np.float32 or result.shape != value.shape:
            return f"{name} is {result.dtype}{list(result.shape)}"
        if not np.isfinite(result).all():
            return f"{name} is not finite"
        ratio = np.abs(result - value) / limit
        if np.max(ratio) > 1:
            where = np.unravel_index(np.argmax(ratio), ratio.shape)
            return (
                f"{name}{list(map(int, where))} is {result[where]}, not {value[where]}, "
                f"{ratio[where]:.3g} times the bound of its error"
            )
    return None
