"""Parallelism and computation: time per token, operations, and the longest chain of operations.

Operations are counted in the program before XLA (`program_work`), of the recurrence in chunks.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.attention import report
from benchmarks.attention.program_work import Work, count_work
from benchmarks.attention.report import ATTENTION, RECURRENCE, VARIANTS, config_of, lines_of
from benchmarks.decoding import decode_call, random_tokens, recompute_call
from benchmarks.measure import Call, Effort, alternate, median, on_simulated_devices
from benchmarks.tables import curves_of
from benchmarks.train_steps import BY_SCAN, abstract_state, by_chunks, our_step, random_batch
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.simple_rnn import Recurrence
from simplernn_jax.ops import gated_linear_recurrence
from simplernn_jax.training.gradient import abstract_model, make_gradient, make_model

CHUNKS, SCAN = f"{RECURRENCE} in chunks", f"{RECURRENCE} by scan"
PROGRAMS = {RECURRENCE: RECURRENCE, ATTENTION: ATTENTION, CHUNKS: RECURRENCE, SCAN: RECURRENCE}
"""Variant of every program."""
IN_CHUNKS = {RECURRENCE: CHUNKS, ATTENTION: ATTENTION}
LEAST_PROMPT = 16
"""Filled slots of a KV cache when decoding is timed: attention computes all slots anyway."""

Times = dict[str, dict[str, float]]
"""Microseconds per token by candidate and length."""


def recurrence_of(program: str, length: int) -> Recurrence:
    """The recurrence of one of `PROGRAMS`."""
    return {CHUNKS: by_chunks(length), SCAN: BY_SCAN}.get(program, gated_linear_recurrence)


def time_calls(
    make: Callable[[str, int], Call],
    names: Iterable[str],
    lengths: tuple[int, ...],
    tokens: int | None,
    effort: tuple[int, int],
) -> Times:
    """Time ``make(name, length)`` of `tokens` tokens per call; None is the length."""
    times: Times = {name: {} for name in names}
    for length in lengths:
        calls = {name: make(name, length) for name in times}
        for name, blocks in alternate(calls, Effort(*effort)).items():
            times[name][str(length)] = 1e6 * median(blocks) / (tokens or length)
    return times


def measure_parallelism(
    lengths: tuple[int, ...], tokens: int, layers: int, effort: tuple[int, int]
) -> dict[str, Any]:
    """Time of a train step at constant tokens, and the longest chain of one sequence's gradient.

    In a chain of operations, each needs the one before. SimpleRNN is the form that training runs;
    on a CPU that goes token by token as `scan`, in one function.
    """

    def step(program: str, length: int) -> Call:
        config = config_of(PROGRAMS[program], length, tokens // length, num_layers=layers)
        return our_step(config, recurrence_of(program, length))

    times = time_calls(step, PROGRAMS, lengths, tokens, effort)
    chains = on_simulated_devices(1, count_chains, lengths=lengths, layers=layers)
    what = f"training, {layers} layer(s)"
    curves = {f"us/token, {what}": times, f"longest chain, {what}": chains}
    in_chunks = {f"{k}, in chunks": v | {RECURRENCE: v[CHUNKS]} for k, v in curves.items()}
    lines = lines_of("parallelism", {f"us/token, {what}": times} | in_chunks)
    return {"curves": curves, "lines": lines}


def count_chains(lengths: tuple[int, ...], layers: int) -> Times:
    """The longest chain by program and length; for `on_simulated_devices`."""
    programs = (ATTENTION, CHUNKS, SCAN)
    return curves_of(programs, lengths, lambda *p: gradient_work(*p, num_layers=layers).chain)


def gradient_work(program: str, length: int, **fields: Any) -> Work:
    """`Work` of the gradient of one sequence by one of `PROGRAMS`."""
    config = config_of(PROGRAMS[program], length, **fields)
    gradient = make_gradient(config, recurrence_of(program, length))
    _, params = abstract_model(config)
    key = jax.random.key_data(jax.random.key(0))
    return count_work(gradient, params, random_batch(config), (), key, jnp.int32(0))


def measure_cost(
    counted: tuple[int, ...],
    prefilled: tuple[int, ...],
    decoded: tuple[int, ...],
    new_tokens: int,
    effort: tuple[int, int],
) -> dict[str, Any]:
    """Operations and time per token of one sequence, or after a context, of length T.

    Operations are counted in the program before XLA, whose own analysis counts the body of a loop
    once and does not see into C functions; the recurrence is counted in chunks. Prefill is one
    forward pass; decode is one stream, for which XLA's CPU backend copies attention's keys and
    values once more for every token.
    """

    def model(variant: str, length: int) -> LanguageModel:
        return LanguageModel(config_of(variant, length).model, rngs=nnx.Rngs(0))

    def prefill(variant: str, length: int) -> Call:
        prompt = random_tokens(config_of(variant, length).model, 1, length)
        return recompute_call(model(variant, length), prompt)

    def decode(variant: str, length: int) -> Call:
        return decode_call(model(variant, length), LEAST_PROMPT, new_tokens)

    curves: dict[str, Any] = on_simulated_devices(1, count_millions, lengths=counted)
    curves["us/token, prefill"] = time_calls(prefill, VARIANTS, prefilled, None, effort)
    curves["us/token, decode"] = time_calls(decode, VARIANTS, decoded, new_tokens, effort)
    return {"curves": curves, "lines": lines_of("computation", curves)}


def count_millions(lengths: tuple[int, ...]) -> dict[str, Times]:
    """Million operations per token by kind, variant and length; for `on_simulated_devices`."""
    kinds: dict[str, Callable[[str, int], float]] = {
        "training": lambda variant, n: gradient_work(IN_CHUNKS[variant], n).flops / n / 1e6,
        "prefill": lambda variant, n: forward_flops(IN_CHUNKS[variant], n, n) / n / 1e6,
        "decode": lambda variant, n: forward_flops(IN_CHUNKS[variant], n, 1) / 1e6,
    }
    name = "million operations/token"
    return {f"{name}, {kind}": curves_of(VARIANTS, lengths, kinds[kind]) for kind in kinds}


def forward_flops(program: str, length: int, tokens: int) -> float:
    """Operations of a forward pass over `tokens` tokens; one token comes after a full state."""
    config, recurrence = config_of(PROGRAMS[program], length), recurrence_of(program, length)
    model = nnx.eval_shape(lambda: make_model(config, nnx.Rngs(0), recurrence))
    graph, params = nnx.split(model, nnx.Param)

    def last_logits(params: Any, ids: jax.Array, state: Any) -> jax.Array:
        hidden, _ = nnx.merge(graph, params).hidden_states(ids, state)
        return nnx.merge(graph, params).logits(hidden[:, -1:])

    state = abstract_state(config.model) if tokens == 1 else None
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    return count_work(last_logits, params, ids, state).flops


PARALLELISM = report.Measurement(
    measure_parallelism,
    {"lengths": (256, 1024, 4096), "tokens": 4096, "layers": 1, "effort": (2, 1)},
    {"lengths": (256, 1024, 4096, 16384), "tokens": 16384, "layers": 4, "effort": (3, 1)},
)
_LENGTHS = (256, 1024, 4096, 16384, 65536)
_QUICK = {"counted": _LENGTHS, "prefilled": _LENGTHS[:3], "decoded": _LENGTHS[:4]}
_FULL = {"counted": _LENGTHS, "prefilled": _LENGTHS[:4], "decoded": _LENGTHS}
COST = report.Measurement(
    measure_cost,
    _QUICK | {"new_tokens": 64, "effort": (2, 1)},
    _FULL | {"new_tokens": 128, "effort": (3, 1)},
)
