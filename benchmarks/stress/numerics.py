"""Every method of the recurrence in float32, against float64."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from simplernn_jax.ops import gated_linear_recurrence, recurrent_step
from simplernn_jax.ops.gated_linear_recurrence.chunkwise import choose_chunk_size
from simplernn_jax.ops.native import supports_native

from .experiment import Case
from .recurrence_bounds import Array, Bounded, Inputs, bounded_recurrence

CASES_PER_PROGRAM = 5
"""Each shape and method compiles a program of its own, which takes longer than a case."""
CASES_PER_CACHE = 100
"""Compiled programs are forgotten after as many: 2 MB for each case otherwise."""

METHODS: dict[str, dict[str, Any]] = {
    "auto": {},
    "chunkwise": {"method": "chunkwise"},
    "chunks of 8": {"chunk_size": 8},
    "scan": {"method": "scan"},
    "chunks of 128": {"chunk_size": 128},
    "recurrent_step": {},
}
"""Arguments of `gated_linear_recurrence`."""

SIZES = (1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 32, 37, 47, 64, 67, 101, 128)
"""Key and value sizes."""
MAX_LENGTH = 100_000
MAX_STEPS = 60
"""Tokens of `recurrent_step`, each of which is a call."""
MAX_STATES = 2**23
"""Entries of the states of all tokens."""
MAX_KEPT = 2**20
"""Those of a gradient, whose reference keeps them."""

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


def numerics(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Compare results in float32, element by element, with bounds of their rounding errors."""
    for number in range(count):
        if number % CASES_PER_PROGRAM == 0:
            draw = np.random.default_rng([seed, number])
            methods = list(METHODS)
            method = methods[number // CASES_PER_PROGRAM % len(methods)]
            program = draw_program(draw, method)
            if number % CASES_PER_CACHE == 0:
                jax.clear_caches()
            run = compiled(program)
        draw = np.random.default_rng([seed, number, 1])
        gates, segments = draw.choice(GATES), draw.choice(SEGMENTS)
        case = draw_case(draw, program, gates, segments if program.has_segments else "one")
        problem = compare(run(case), expected(program, case), program)
        kind = method if method != "auto" or supports_native(jnp.float32) else "chunkwise"
        yield Case(f"{number}, {program}, gates {gates}, segments {segments}", problem, kind)


def draw_program(draw: np.random.Generator, method: str) -> Program:
    """Draw a shape, most often of a short sequence."""
    longest = MAX_STEPS if method == "recurrent_step" else MAX_LENGTH
    length = round(longest ** draw.random() ** 3)
    while True:
        batch, heads = (int(x) for x in draw.integers(1, 6, 2))
        key_dim, value_dim = (int(x) for x in draw.choice(SIZES, 2))
        states = batch * heads * key_dim * value_dim * length
        if states <= max(MAX_STATES, length):
            break
    sequence = method != "recurrent_step"
    return Program(
        method,
        batch,
        length,
        heads,
        key_dim,
        value_dim,
        has_state=bool(draw.random() < 0.7),
        has_segments=sequence and bool(draw.random() < 0.7),
        has_gradient=sequence and states <= MAX_KEPT and bool(draw.random() < 0.6),
    )


def draw_case(draw: np.random.Generator, program: Program, gates: str, segments: str) -> Inputs:
    """Draw float32 numbers of any scale, as float64."""
    _, batch, length, heads, key_dim, value_dim, *_ = program
    keys, values = (length, batch, heads, key_dim), (length, batch, heads, value_dim)
    state = (batch, heads, key_dim, value_dim)

    def normal(shape: tuple[int, ...]) -> Array:
        return 10 ** draw.uniform(-3, 3) * draw.normal(size=shape)

    case = Inputs(
        q=normal(keys),
        k=np.abs(normal(keys)) if draw.random() < 0.5 else normal(keys),
        v=normal(values),
        log_gate=draw_log_gates(draw, gates, keys),
        state=normal(state) if program.has_state else np.zeros(state),
        reset=draw_reset(draw, segments, (length, batch)),
        d_output=normal(values),
        d_state=normal(state),
    )
    rounded = (x if x.dtype == bool else x.astype(np.float32).astype(float) for x in case)
    return Inputs(*rounded)


def draw_log_gates(draw: np.random.Generator, kind: str, shape: tuple[int, ...]) -> Array:
    """Draw log gates from -1e4 to 0."""

    def between(largest: float, smallest: float, shape: tuple[int, ...] = shape) -> Array:
        return -np.exp(draw.uniform(np.log(largest), np.log(smallest), shape))

    match kind:
        case "zero":
            return np.zeros(shape)
        case "near zero":
            return between(1e-9, 1e-2)
        case "strong":
            return between(1.0, 1e4)
        case "all scales":
            return between(1e-9, 1e4)
        case "by channel":
            return between(0.5, 2.0) * -between(1e-9, 5e3, shape[2:])
        case "rare":  # a state of many tokens is forgotten at once
            return np.where(draw.random(shape) < 0.02, -1e4, between(1e-9, 1e-3))
        case _:
            return np.full(shape, -1e4)


def draw_reset(draw: np.random.Generator, kind: str, shape: tuple[int, int]) -> Array:
    """Draw the tokens that start a segment; the first continues that of the initial state."""
    reset = np.zeros(shape, bool)
    match kind:
        case "random":
            reset = draw.random(shape) < 10 ** draw.uniform(-3, 0)
        case "every token":
            reset[:] = True
        case "first token":
            reset[1:2] = True
        case "two ids":
            reset = draw.random(shape) < 0.5
    reset[0] = False
    return reset


def compiled(program: Program) -> Callable[[Inputs], dict[str, Array]]:
    """Return the function of the program, to results with the axis of time first."""

    def results(floating: dict[str, Any], ids: Any, cotangents: Any) -> dict[str, Any]:
        def call(floating: dict[str, Any]) -> Any:
            return gated_linear_recurrence(**floating, segment_ids=ids, **METHODS[program.method])

        (output, state), pullback = jax.vjp(call, floating)
        gradients: dict[str, Any] = {}
        if program.has_gradient:
            gradients = {f"d_{name}": x for name, x in pullback(cotangents)[0].items()}
        return {"output": output, "final_state": state, **gradients}

    whole, step = jax.jit(results), jax.jit(recurrent_step)

    def run(case: Inputs) -> dict[str, Array]:
        single = [jnp.asarray(x.astype(np.float32)) for x in case]
        if program.method == "recurrent_step":
            outputs, state = [], single[4]
            for token in zip(*single[:4], strict=True):
                output, state = step(*token, state)
                outputs.append(np.asarray(output))
            return {"output": np.stack(outputs), "final_state": np.asarray(state)}
        batch_first = [jnp.swapaxes(x, 0, 1) for x in single[:4]]
        floating = dict(zip(("q", "k", "v", "log_gate"), batch_first, strict=True))
        if program.has_state:
            floating["initial_state"] = single[4]
        # An id that occurs again is another segment.
        ids = jnp.asarray(np.cumsum(case.reset.T, axis=1) % 2, jnp.int32)
        cotangents = (jnp.swapaxes(single[6], 0, 1), single[7])
        found = whole(floating, ids if program.has_segments else None, cotangents)
        return {
            name: np.asarray(x) if "state" in name else np.swapaxes(np.asarray(x), 0, 1)
            for name, x in found.items()
        }

    return run


def expected(program: Program, case: Inputs) -> dict[str, Bounded]:
    """Compute the program's results in float64, and bounds for its method."""
    chunk_size = METHODS[program.method].get("chunk_size")
    if METHODS[program.method].get("method") == "chunkwise" or (
        program.method == "auto" and not supports_native(jnp.float32)
    ):
        chunk_size = choose_chunk_size(program.length)
    return bounded_recurrence(case, chunk_size, program.has_gradient)


def compare(found: dict[str, Array], expected: dict[str, Bounded], program: Program) -> str | None:
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
