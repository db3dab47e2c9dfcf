"""Techniques to scale training, A to F, each compared with the same training without it.

Every training is of the same small model on the same number of tokens; the loss is that of held-out
text. Two other seeds show the noise. Devices of a mesh are simulated and share the cores, so that
their tokens/s show the cost of a schedule, not the gain from hardware.
"""

import copy
import functools
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplernn_jax.config import Config
from simplernn_jax.data.batches import BatchSource
from simplernn_jax.data.evaluation_batches import Contexts
from simplernn_jax.inference import generate, load_state, save_state
from simplernn_jax.ops import gated_linear_recurrence
from simplernn_jax.training.accumulation import split_into_windows
from simplernn_jax.training.evaluate import Evaluator
from simplernn_jax.training.train_step import init_model, make_grad_fn

from . import sizes, train_steps
from .measure import Effort, alternate, median, on_simulated_devices, seconds_of
from .tables import Row, Table
from .train_steps import Trained, change, measure_on_corpus, with_method

BATCH, LENGTH, STEPS = 8, 256, 200
EAGER_TOKENS, PREFIX = 16, 4096
ERROR_LENGTH, HALF_LIFE = 16384, 4096
LONG = 4
"""Factor between long sequences and LENGTH; the batch is smaller by it."""
LONG_SIZES: Row = {"batch_size": BATCH // LONG, "sequence_length": LONG * LENGTH}
WINDOWS = LONG_SIZES | {"bptt_window": LENGTH}

ORDER = "=ABCDEF+"
"""First letters of the techniques; ``=`` is the baseline, ``+`` is none of the list."""
TECHNIQUES: tuple[tuple[str, str, Row], ...] = (
    ("= baseline", "whole step compiled, fused recurrence", {}),
    ("= second seed", "parameters and batches", {"seed": 1}),
    ("= third seed", "parameters and batches", {"seed": 2}),
    ("A sliding windows", "stride of half a window", {"stride": LENGTH // 2}),
    ("B pipeline parallelism", "2 devices, a layer each", {"pipeline": 2}),
    ("B sequence parallelism", "2 devices, half of each sequence", {"sequence": 2}),
    ("C one token at a time", "a compiled loop", {"mixer_options": {"method": "scan"}}),
    ("C chunkwise", "matmuls in XLA", {"mixer_options": {"method": "chunkwise"}}),
    ("D bfloat16 matmuls", "operands", {"precision": "bfloat16"}),
    ("D bfloat16 state", "recurrent state", {"state_precision": "bfloat16"}),
    ("E streams", "state carried between steps", {"mode": "stream"}),
    ("E long sequences", f"{LONG} windows long, full gradient", LONG_SIZES),
    ("E truncated in a step", "long, gradient cut between windows", WINDOWS),
    ("E full BPTT in windows", "long, forward pass recomputed", WINDOWS | {"bptt": "full"}),
    ("+ accumulation", "4 microbatches", {"gradient_accumulation": 4}),
    ("+ rematerialization", "layers recomputed", {"remat": "block"}),
)
"""Technique, change, and fields of the configuration or options of `train_on_corpus`."""


def run(effort: Effort) -> Iterator[Table]:
    """Tables of the trainings, each of which runs once, and of other parts."""
    with tempfile.TemporaryDirectory() as workdir:
        rows, trained = compare(small_run(), workdir)
        bias = truncation_bias(change(small_run(), **LONG_SIZES), trained)
        rows.append(eager_step(small_run()))
        rows += evaluations(small_run(), trained, effort)
        rows += cached_prefix(trained, workdir, effort)
    rows.sort(key=lambda row: ORDER.index(row["technique"][0]))
    yield Table(f"scaling: 2 layers of width 64, {STEPS * BATCH * LENGTH:,} tokens", rows)
    yield Table(f"scaling, E: gradient of truncated windows of {LONG * LENGTH:,} tokens", bias)
    errors = state_errors()
    yield Table("scaling, D: RMS error of the recurrence by dtype of the state", errors)
    yield from sizes.run_memory()


def small_run() -> Config:
    """Two residual layers of width 64 on windows of the default corpus."""
    config = train_steps.load_config("tiny", BATCH, LENGTH, steps=STEPS, eval_tokens=65536)
    config.model.vocab_size = 260  # even, so that a mesh can divide it
    change(config, hidden_dim=64, key_dim=64, value_dim=64, mlp_dim=256)
    return change(config, learning_rate=1e-2, warmup_steps=50, gradient_accumulation=1)


def compare(base: Config, workdir: str) -> tuple[list[Row], Trained]:
    """Train with every technique; return the rows of the table, and the baseline's training."""
    rows: list[Row] = []
    runs: list[Trained] = []
    for technique, what, given in TECHNIQUES:
        options = {name: given[name] for name in ("seed",) if name in given}
        fields = {name: value for name, value in given.items() if name not in options}
        config = change(copy.deepcopy(base), **fields)
        if fields.keys() & {"pipeline", "sequence"}:
            measured = on_simulated_devices(2, measure_on_corpus, config=config, workdir=workdir)
        else:
            runs.append(train_steps.train_on_corpus(config, workdir, **options))
            measured = runs[-1].measured
        rows.append({"technique": technique, "change": what} | measured)
    for row in rows[1:]:
        row["difference"] = row["nats/token"] - rows[0]["nats/token"]
    return rows, runs[0]


def gradient_arguments(params: nnx.State, batch: Any) -> Any:
    """Arguments of the function that `make_grad_fn` returns."""
    batch, key = jax.tree.map(jnp.asarray, batch), jax.random.key_data(jax.random.key(0))
    return params, batch, (), key, jnp.zeros((), int)


def eager_step(config: Config) -> Row:
    """Time loss and gradient without compilation, one token after another."""
    config = change(config, sequence_length=EAGER_TOKENS)
    params = init_model(config, jax.random.key(0))[1]
    arguments = gradient_arguments(params, train_steps.random_batch(config))
    gradient_of = make_grad_fn(with_method(config, "scan"))
    with jax.disable_jit():
        seconds = min(seconds_of(lambda: gradient_of(*arguments)) for _ in range(3))
    return {
        "technique": "C eager, one token at a time",
        "change": "no compilation, no optimizer",
        "tokens/s": config.data.batch_size * EAGER_TOKENS / seconds,
    }


def evaluations(config: Config, trained: Trained, effort: Effort) -> list[Row]:
    """Evaluate the baseline with the state carried, and by windows from a zero state."""
    evaluator = Evaluator(config, trained.corpus.tokenizer.pad_id)
    length = config.data.sequence_length
    given = (trained.params, trained.corpus.validation, config.train.eval_tokens)
    rows: list[Row] = []
    for stride in (0, length // 4, length // 2, length):
        windows = Contexts(length, stride) if stride else None
        call: Any = functools.partial(evaluator, *given, contexts=windows)  # type: ignore[arg-type]
        result, loss = call(), call().nats_per_token
        what = f"windows of {length}, stride {stride}" if stride else "state carried"
        row = {"technique": "A evaluation", "change": what, "nats/token": loss}
        row["tokens/s"] = result.predictions / median(alternate({"": call}, effort)[""])
        rows.append(row | {"difference": loss - trained.measured["nats/token"]})
    return rows


def cached_prefix(trained: Trained, workdir: str, effort: Effort) -> list[Row]:
    """Time the first token after a prefix, prefilled and from its saved state."""
    model, tokenizer = trained.model(), trained.corpus.tokenizer
    text = np.asarray(trained.corpus.train.tokens[:PREFIX], np.int32).tolist()
    path = os.path.join(workdir, "prefix.state")
    save_state(path, generate(model, [text], max_new_tokens=0).state, model, tokenizer)

    def prefill() -> Any:
        return generate(model, [text], max_new_tokens=1).tokens

    def load() -> Any:
        return generate(model, state=load_state(path, model, tokenizer), max_new_tokens=1).tokens

    tokens = [call() for call in (prefill, load)]
    if not np.array_equal(*tokens):
        raise RuntimeError(f"token {tokens[1]} from a loaded state, {tokens[0]} from its text")
    size = f"state of {os.path.getsize(path) / 1e3:.0f} kB loaded"
    rows: list[Row] = []
    for what, blocks in alternate({f"{len(text):,} tokens": prefill, size: load}, effort).items():
        name = "F prefix cached" if what == size else "F prefix prefilled"
        change = f"{what} and one generated: {1e3 * median(blocks):.1f} ms"
        rows.append({"technique": name, "change": change})
    return rows


def truncation_bias(
    config: Config, trained: Trained, windows: Sequence[int] = (16, 64, 256, 1024)
) -> list[dict[str, float]]:
    """Compare the gradient of truncated windows with that of whole sequences, after training.

    The difference is an RMS, relative to the whole gradient. A window of ``data.sequence_length``
    truncates nothing.
    """
    corpus = trained.corpus
    source = BatchSource(corpus.train, config.data, config.train.seed, corpus.tokenizer.pad_id)
    batch = source[config.train.steps]  # not trained on

    def gradient(window: int) -> np.ndarray:
        config.train.bptt_window = window
        given = split_into_windows(batch, window) if window else batch
        gradient_of: Any = jax.jit(make_grad_fn(config))
        leaves = jax.tree.leaves(gradient_of(*gradient_arguments(trained.params, given))[2])
        return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in leaves])

    whole, rows = gradient(0), []
    for window in windows:
        cut = gradient(window)
        difference, one, other = (float(np.linalg.norm(x)) for x in (cut - whole, cut, whole))
        row = {"window": window, "difference / whole": difference / other}
        rows.append(row | {"cosine": float(cut @ whole) / one / other})
    return rows


def state_errors(length: int = ERROR_LENGTH) -> list[Row]:
    """RMS error of the recurrence's output against float64, by position and dtype of the state.

    Values have mean 1 and decay is slow (a half-life of `HALF_LIFE` tokens): the state grows large
    compared with the contribution of one token.
    """
    draw = np.random.default_rng(0)
    q, k, v = draw.normal(size=(3, 1, length, 2, 8))
    wide = (q, 1 / (1 + np.exp(k)), 1 + v, np.full_like(q, -np.log(2) / HALF_LIFE))
    arrays = [jnp.float32(x) for x in wide]
    with jax.enable_x64(True):
        rounded = [jnp.float64(np.float32(x)) for x in wide]
        exact = np.asarray(gated_linear_recurrence(*rounded, method="scan")[0])

    def step(state: jax.Array, part: Any) -> tuple[jax.Array, jax.Array]:
        output, state = gated_linear_recurrence(*part, initial_state=state, method="scan")
        return state.astype(jnp.bfloat16), output

    def rounded_every(tokens: int) -> jax.Array:
        start = jnp.zeros((1, 2, 8, 8), jnp.bfloat16)
        parts = [x.reshape(-1, 1, tokens, 2, 8) for x in arrays]
        return jax.lax.scan(step, start, parts)[1].reshape(q.shape)

    outputs = {
        "float32": gated_linear_recurrence(*arrays)[0],
        "bfloat16, each 64 tokens": rounded_every(64),
        "bfloat16, each token": rounded_every(1),
    }
    rows, end = [], 16
    while end <= length:
        row: Row = {"position": f"up to {end:,}"}
        part = exact[:, end // 2 : end]
        for name, output in outputs.items():
            error = np.asarray(output, np.float64)[:, end // 2 : end] - part
            row[name] = float(np.linalg.norm(error) / np.linalg.norm(part))
        rows.append(row)
        end *= 4
    return rows
