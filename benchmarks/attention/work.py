"""Parallelism and computation: time per token, operations, and the longest chain of operations.

Operations are counted in the program before XLA (`program_work`), in a process without the C
functions, which are opaque.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.attention.program_work import Work, count_work
from benchmarks.attention.report import Line, Measurement, Results, all_ends, lines_at_ends
from benchmarks.attention.variants import ATTENTION, RECURRENCE, VARIANTS, config_of
from benchmarks.decoding import decode_call, random_tokens, recompute_call
from benchmarks.measure import Call, Effort, alternate, call_isolated, median
from benchmarks.tables import Curves
from benchmarks.train_steps import BY_SCAN, by_chunks, our_step, random_batch
from simplernn_jax.config import Config
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.simple_rnn import Recurrence
from simplernn_jax.ops import gated_linear_recurrence
from simplernn_jax.training.gradient import abstract_model, make_gradient

CHUNKS, SCAN = f"{RECURRENCE} in chunks", f"{RECURRENCE} by scan"
PROGRAMS = {RECURRENCE: RECURRENCE, ATTENTION: ATTENTION, CHUNKS: RECURRENCE, SCAN: RECURRENCE}
"""Variant of every program."""
NO_COMPILER = {"CC": "/no/compiler"}
LEAST_PROMPT = 16
"""Filled slots of a KV cache when decoding is timed: attention computes all slots anyway."""


def recurrence_of(program: str, length: int) -> Recurrence:
    """The recurrence of one of `PROGRAMS`."""
    return {CHUNKS: by_chunks(length), SCAN: BY_SCAN}.get(program, gated_linear_recurrence)


def measure_parallelism(
    lengths: tuple[int, ...], tokens: int, layers: int, effort: tuple[int, int]
) -> dict[str, Any]:
    """Time of a train step at constant tokens, and the longest chain of one sequence's gradient.

    In a chain of operations, each needs the one before. SimpleRNN is the form that training runs;
    on a CPU that goes token by token as `scan`, in one function.
    """
    times: dict[str, dict[str, float]] = {program: {} for program in PROGRAMS}
    for length in lengths:
        steps = {
            program: our_step(
                config_of(variant, length, tokens // length, num_layers=layers),
                recurrence_of(program, length),
            )
            for program, variant in PROGRAMS.items()
        }
        for program, blocks in alternate(steps, Effort(*effort)).items():
            times[program][str(length)] = 1e6 * median(blocks) / tokens
    chains = call_isolated(count_chains, NO_COMPILER, lengths=lengths, layers=layers)
    step = f"training, {layers} layer(s)"
    return {"curves": {f"us/token, {step}": times, f"longest chain, {step}": chains}}


def count_chains(lengths: tuple[int, ...], layers: int) -> Curves:
    """The longest chain by program and length; for `call_isolated`."""
    return {
        program: {
            str(length): gradient_work(
                config_of(variant, length, num_layers=layers), recurrence_of(program, length)
            ).chain
            for length in lengths
        }
        for program, variant in PROGRAMS.items()
        if program != RECURRENCE
    }


def gradient_work(config: Config, recurrence: Recurrence = gated_linear_recurrence) -> Work:
    """`Work` of the gradient of one batch, in a process without the C functions."""
    _, params = abstract_model(config)
    key = jax.random.key_data(jax.random.key(0))
    gradient = make_gradient(config, recurrence)
    return count_work(gradient, params, random_batch(config), (), key, jnp.int32(0))


def parallelism_lines(results: Results) -> Iterator[Line]:
    """Lines for the time of both forms of the recurrence, and for the longest chain."""
    (step, times), (chain, chains) = results["curves"].items()
    yield from lines_at_ends("parallelism", step, times)
    for quantity, curves in ((step, times), (chain, chains)):
        in_chunks = {RECURRENCE: curves[CHUNKS], ATTENTION: curves[ATTENTION]}
        lines = lines_at_ends("parallelism", f"{quantity}, in chunks", in_chunks)
        yield from lines[-1:] if curves is chains else lines


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
    curves: dict[str, Any] = call_isolated(count_millions, NO_COMPILER, lengths=counted)
    for kind, lengths in (("prefill", prefilled), ("decode", decoded)):
        times: dict[str, dict[str, float]] = {variant: {} for variant in VARIANTS}
        for length in lengths:
            tokens = length if kind == "prefill" else new_tokens
            calls: dict[str, Call] = {}
            for variant in VARIANTS:
                config = config_of(variant, length).model
                model = LanguageModel(config, rngs=nnx.Rngs(0))
                calls[variant] = (
                    recompute_call(model, random_tokens(config, 1, length))
                    if kind == "prefill"
                    else decode_call(model, random_tokens(config, 1, LEAST_PROMPT), new_tokens)
                )
            for variant, blocks in alternate(calls, Effort(*effort)).items():
                times[variant][str(length)] = 1e6 * median(blocks) / tokens
        curves[f"us/token, {kind}"] = times
    return {"curves": curves}


def count_millions(lengths: tuple[int, ...]) -> dict[str, Any]:
    """Million operations per token by kind, variant and length; for `call_isolated`."""
    kinds = {
        "training": lambda config, length: gradient_work(config).flops / length,
        "prefill": lambda config, length: _forward_flops(config, length) / length,
        "decode": lambda config, length: _forward_flops(config, 1),
    }
    return {
        f"million operations/token, {kind}": {
            variant: {
                str(length): count(config_of(variant, length), length) / 1e6 for length in lengths
            }
            for variant in VARIANTS
        }
        for kind, count in kinds.items()
    }


def _forward_flops(config: Config, tokens: int) -> float:
    """Operations of a forward pass over `tokens` tokens; one token comes after a full state."""
    graph, params = abstract_model(config)

    def last_logits(params: Any, ids: jax.Array, state: Any) -> jax.Array:
        hidden, _ = nnx.merge(graph, params).hidden_states(ids, state)
        return nnx.merge(graph, params).logits(hidden[:, -1:])

    def make_state() -> Any:
        return LanguageModel(config.model, rngs=nnx.Rngs(0)).initial_state(1)

    state = nnx.eval_shape(make_state) if tokens == 1 else None
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    return count_work(last_logits, params, ids, state).flops


PARALLELISM = Measurement(
    measure_parallelism,
    parallelism_lines,
    {"lengths": (256, 1024, 4096), "tokens": 4096, "layers": 1, "effort": (2, 1)},
    {"lengths": (256, 1024, 4096, 16384), "tokens": 16384, "layers": 4, "effort": (3, 1)},
)
_LENGTHS = (256, 1024, 4096, 16384, 65536)
_QUICK = {"counted": _LENGTHS, "prefilled": _LENGTHS[:3], "decoded": _LENGTHS[:4]}
_FULL = {"counted": _LENGTHS, "prefilled": _LENGTHS[:4], "decoded": _LENGTHS}
COST = Measurement(
    measure_cost,
    all_ends("computation"),
    _QUICK | {"new_tokens": 64, "effort": (2, 1)},
    _FULL | {"new_tokens": 128, "effort": (3, 1)},
)
