"""Comparison of `base` with its variant of attention: time, FLOPs, memory, communication, loss.

FLOPs of matmuls are counted in the program before XLA, whose own `cost_analysis` counts the body of
a loop once and does not see into C functions. Here loops count as often as they run, this package's
operations count in the form for any platform, and other custom calls are rejected.
"""

import math
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplernn_jax.analysis import decompose_layers
from simplernn_jax.errors import counted
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.language_model import abstract_model
from simplernn_jax.ops.primitive import as_list
from simplernn_jax.training.train_step import abstract_train_model, make_grad_fn

from .. import train_steps
from ..decoding import decode_call, random_tokens, recompute_call
from ..measure import Call, Effort, alternate, median, on_simulated_devices
from ..tables import Curves, Row, curves_of
from ..train_steps import Trained, compile_quickly, count_parameters, train_on_corpus, with_method
from .aspects import ATTENTION, RECURRENCE, VARIANTS, Measured, config_of, line, lines_of

CHUNKS = f"{RECURRENCE} chunkwise"
PROGRAMS: dict[str, tuple[str, str]] = {
    RECURRENCE: (RECURRENCE, "auto"),
    ATTENTION: (ATTENTION, "auto"),
    CHUNKS: (RECURRENCE, "chunkwise"),
    f"{RECURRENCE} by scan": (RECURRENCE, "scan"),
}
"""Variant and method of the recurrence of every program."""
COUNTED = {RECURRENCE: "chunkwise", ATTENTION: "auto"}
"""Method in which FLOPs are counted."""
LENGTHS = (256, 1024, 4096, 16384, 65536)
LEAST_PROMPT = 16
"""Filled slots of a KV cache when decoding is timed: attention computes all slots anyway."""
DEVICES = 8


def time_calls(
    make: Callable[[str, int], Call],
    names: Iterable[str],
    lengths: Sequence[int],
    tokens: int | None,
    blocks: int,
) -> Curves:
    """Time ``make(name, length)``, in microseconds per token of `tokens`, or of the length."""
    times: dict[str, dict[str, float]] = {name: {} for name in names}
    for length in lengths:
        calls = {name: make(name, length) for name in times}
        for name, seconds in alternate(calls, Effort(blocks, 1)).items():
            times[name][str(length)] = 1e6 * median(seconds) / (tokens or length)
    return times


def measure_parallelism(quick: bool) -> Measured:
    """Time of a train step at constant tokens.

    SimpleRNN is the form that training runs; on a CPU that goes token by token as `scan`, in one
    function.
    """
    lengths, layers, blocks = (LENGTHS[:3], 1, 2) if quick else (LENGTHS[:4], 4, 3)
    tokens = lengths[-1]

    def step(program: str, length: int) -> Call:
        variant, method = PROGRAMS[program]
        config = config_of(variant, length, tokens // length, num_layers=layers)
        return train_steps.our_step(with_method(config, method))

    what = f"us/token, training, {counted(layers, 'layer')}"
    times = time_calls(step, PROGRAMS, lengths, tokens, blocks)
    in_chunks = {**times, RECURRENCE: times[CHUNKS]}
    compared = {what: times, f"{what}, chunkwise": in_chunks}
    return Measured(lines_of("parallelism", compared), {what: times})


def measure_cost(quick: bool) -> Measured:
    """FLOPs and time per token of one sequence, or after a context, of length T.

    FLOPs are counted in matmuls, and the recurrence in its chunkwise form. Prefill is one forward
    pass; decode is one stream, for which XLA's CPU backend copies attention's keys and values once
    more for every token.
    """
    prefilled, decoded = (LENGTHS[:3], LENGTHS[:4]) if quick else (LENGTHS[:4], LENGTHS)
    new_tokens, blocks = (64, 2) if quick else (128, 3)

    def prefill(variant: str, length: int) -> Call:
        config = config_of(variant, length).model
        model = LanguageModel(config, rngs=nnx.Rngs(0))
        return recompute_call(model, random_tokens(config, 1, length))

    def decode(variant: str, length: int) -> Call:
        model = LanguageModel(config_of(variant, length).model, rngs=nnx.Rngs(0))
        return decode_call(model, LEAST_PROMPT, new_tokens)

    curves = count_mflops(LENGTHS)
    curves["us/token, prefill"] = time_calls(prefill, VARIANTS, prefilled, None, blocks)
    curves["us/token, decode"] = time_calls(decode, VARIANTS, decoded, new_tokens, blocks)
    return Measured(lines_of("computation", curves), curves)


def count_mflops(lengths: Sequence[int]) -> dict[str, Curves]:
    """MFLOPs per token by kind, variant and length."""
    kinds: dict[str, Callable[[str, int], float]] = {
        "training": lambda variant, n: gradient_flops(variant, n) / n / 1e6,
        "prefill": lambda variant, n: forward_flops(variant, n, n) / n / 1e6,
        "decode": lambda variant, n: forward_flops(variant, n, 1) / 1e6,
    }
    name = "MFLOPs/token"
    return {f"{name}, {kind}": curves_of(VARIANTS, lengths, kinds[kind]) for kind in kinds}


def gradient_flops(variant: str, length: int) -> float:
    """FLOPs of the gradient of one sequence."""
    config = with_method(config_of(variant, length), COUNTED[variant])
    _, params = abstract_model(config.model)
    key = jax.random.key_data(jax.random.key(0))
    batch = train_steps.random_batch(config)
    return count_flops(make_grad_fn(config), (params, ()), batch, (), key, jnp.int32(0))


def forward_flops(variant: str, length: int, tokens: int) -> float:
    """FLOPs of a forward pass over `tokens` tokens; one token comes after a full state."""
    config = with_method(config_of(variant, length), COUNTED[variant])
    graph, params = abstract_train_model(config)

    def last_logits(params: Any, ids: jax.Array, state: Any) -> jax.Array:
        model = nnx.merge(graph, params)
        hidden, _ = model.hidden_states(ids, state)
        return model.logits(hidden[:, -1:])

    state = train_steps.abstract_state(config.model) if tokens == 1 else None
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    return count_flops(last_logits, params, ids, state)


def measure_memory(quick: bool) -> Measured:
    """Working memory of a train step on one sequence by XLA's memory analysis; decoder state."""
    lengths, layers = ((1024, 65536), 1) if quick else (LENGTHS, 4)

    def of_step(variant: str, length: int) -> float:
        return train_steps.megabytes(compile_quickly(config_of(variant, length, num_layers=layers)))

    def of_state(variant: str, length: int) -> float:
        model = config_of(variant, length, num_layers=layers).model
        leaves = jax.tree.leaves(train_steps.abstract_state(model))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 1e3

    quantities = {"MB of a train step": of_step, "kB of decoder state": of_state}
    curves = {
        f"{quantity}, {counted(layers, 'layer')}": curves_of(VARIANTS, lengths, value)
        for quantity, value in quantities.items()
    }
    return Measured(lines_of("memory", curves), curves)


def measure_communication(quick: bool) -> Measured:
    """Received by a device per layer in a train step on one sequence that is sharded over devices.

    Read from the compiled program. Gradients of parameters come on top, the same for both variants
    whatever the length.
    """
    lengths = (4096, 65536) if quick else LENGTHS[1:]
    received = on_simulated_devices(DEVICES, kilobytes_received, lengths=lengths, devices=DEVICES)
    curves = {f"kB received per device and layer, {DEVICES} devices": received}
    return Measured(lines_of("scalability", curves), curves)


def kilobytes_received(lengths: Sequence[int], devices: int) -> Curves:
    """Return kB by variant and length, without gradients of parameters and the loss."""

    def received(variant: str, length: int) -> float:
        config = config_of(variant, length, num_layers=1, sequence=devices)
        found = train_steps.collectives(compile_quickly(config).as_text())
        for leaf in jax.tree.leaves(abstract_model(config.model)[1]):
            found["all-reduce", leaf.size * 4] -= 1
        share = (devices - 1) / devices
        factors = {"all-reduce": 2 * share, "all-gather": share, "all-to-all": share}
        factors |= {"reduce-scatter": devices - 1, "collective-permute": 1}
        # No scalars: loss, number of predictions, norm of the gradient.
        return sum(n * size * factors[kind] for (kind, size), n in found.items() if size > 8) / 1e3

    return curves_of(VARIANTS, lengths, received)


def count_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """FLOPs of the matmuls of ``function(*arguments)``; arrays may be given by shape alone.

    Of the branches of a condition, the one with the most counts.

    Raises:
      ValueError: the program has a custom call, or a loop of unknown length.
    """
    return sum(map(_count, jax.make_jaxpr(function)(*arguments).jaxpr.eqns))


def _count(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name in ("ffi_call", "while"):
        raise ValueError(f"the work of {name} cannot be counted; trace a program without it")
    if "op" in params:  # the primitive of `simplernn_jax.ops.primitive`
        shapes = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in equation.invars]
        return count_flops(as_list(params["op"].default), *shapes)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
    programs = params.get("branches") or [
        params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params
    ]
    inner = (sum(map(_count, getattr(x, "jaxpr", x).eqns)) for x in programs)
    return max(inner, default=0.0) * (params["length"] if name == "scan" else 1)


LENGTH, BATCH = 256, 8


def measure_corpus(quick: bool) -> Measured:
    """Held-out bits/byte of text of the standard library, and relative error of the implicit map.

    Text is scored document after document, the state carried; attention sees the last 256 bytes, as
    in training. Weights of the recurrence's map times values must equal the output of the
    definition, and, after norm, gate and projection, of the layer. Attention's weights are its
    softmax.
    """
    fields = {"steps": 150, "eval_tokens": 65_536} if quick else {"steps": 1400, "eval_tokens": 0}
    rows: list[Row] = []
    lines: list[Row] = []
    losses: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        for variant in VARIANTS:
            for seed in range(1 if quick else 3):
                config = config_of(variant, LENGTH, BATCH, **fields)
                trained = train_on_corpus(config, folder, seed=seed)
                print(f"  {variant}, seed {seed}: {trained.measured}", flush=True)
                losses[variant].append(trained.measured["bits/byte"])
                if variant == RECURRENCE and not seed:
                    lines = map_lines(trained, 256 if quick else 1024)
            row = {"variant": variant, "parameters": count_parameters(config_of(variant, LENGTH))}
            rows.append(row | {"bits/byte by seed": losses[variant]})
    lines = loss_lines(fields["steps"] * LENGTH * BATCH, losses) + lines
    return Measured(lines, rows=rows)


def loss_lines(num_bytes: int, losses: dict[str, list[float]]) -> list[Row]:
    """Lines for mean and range of the loss; means within the larger range count as equal."""
    seeds = len(losses[RECURRENCE])
    means = {variant: statistics.mean(each) for variant, each in losses.items()}
    ranges = {variant: max(each) - min(each) for variant, each in losses.items()}
    what = f"held-out bits/byte after {num_bytes:,} bytes, mean of {counted(seeds, 'seed')}"
    largest = max(ranges.values())
    mean = line("scalability", what, means, tolerance=largest, is_decisive=seeds > 1)
    what = "range over seeds; means that differ by less count as equal"
    return [mean, line("scalability", what, ranges, is_decisive=False)][:seeds]


def map_lines(trained: Trained, tokens: int) -> list[Row]:
    """Lines for the errors of the recurrence's map of the first held-out tokens."""
    held_out: Any = trained.corpus.validation
    model = trained.model()
    ids = np.array(held_out.tokens[:tokens])
    layers = decompose_layers(model, ids, model.initial_state(1))
    errors = {
        "relative error of the implicit attention map": [x.operator_error for x in layers],
        "the same after norm, gate and projection": [x.layer_error for x in layers],
    }
    lines = []
    for what, each in errors.items():
        values = {RECURRENCE: float(max(each)), ATTENTION: None}
        lines.append(line("interpretability", f"{what}, worst layer", values))
    return lines
