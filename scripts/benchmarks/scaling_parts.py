"""Parts of the scaling benchmark that are no training."""

import dataclasses
import os
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import tables
from benchmarks.interleave import Call, seconds_of
from benchmarks.jax_steps import random_batch, recurrence_by
from benchmarks.short_training import Trained
from simplernn_jax.config import Config
from simplernn_jax.data.batches import BatchSource
from simplernn_jax.data.evaluation_batches import Contexts
from simplernn_jax.inference import generate, load_state, save_state
from simplernn_jax.ops import gated_linear_recurrence
from simplernn_jax.training.accumulation import windows_of
from simplernn_jax.training.evaluate import Evaluator
from simplernn_jax.training.gradient import abstract_model, make_gradient
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.train_step import init_train_state

EAGER_TOKENS = 16
PREFIX = 4096
ERROR_LENGTH = 16384
HALF_LIFE = 4096


def eager_step(config: Config) -> dict[str, Any]:
    """Loss and gradient without compilation, one token after another."""
    short = dataclasses.replace(config.data, sequence_length=EAGER_TOKENS)
    batch = jax.tree.map(jnp.asarray, random_batch(dataclasses.replace(config, data=short)))
    optimizer = make_optimizer(config.optimizer, 1)
    state = jax.jit(lambda: init_train_state(config, optimizer))()
    gradient_of = make_gradient(config)
    with jax.disable_jit(), recurrence_by(method="scan"):
        seconds = [
            seconds_of(lambda: gradient_of(state.params, batch, (), state.rng, state.step))
            for _ in range(3)
        ]
    return {
        "name": "C eager, one token at a time",
        "changes": "no compilation, no optimizer",
        "tokens_per_s": batch.tokens.size / min(seconds),
    }


def evaluations(config: Config, trained: Trained) -> list[dict[str, Any]]:
    """The plain run's held-out loss with the state carried, and by windows from zero."""
    evaluator = Evaluator(config, trained.corpus.tokenizer.pad_id)
    length, limit = config.data.sequence_length, config.train.eval_tokens
    held_out: Any = trained.corpus.validation
    rows = []
    for name, windows in (
        ("state carried", None),
        ("a quarter on", Contexts(length, length // 4)),
        ("half a window on", Contexts(length, length // 2)),
        ("a window on", Contexts(length, length)),
    ):

        def call(windows: Contexts | None = windows) -> Any:
            return evaluator(trained.params, held_out, limit, windows=windows)

        result = call()  # compiles
        rows.append(
            {
                "name": "A evaluation",
                "changes": name if windows is None else f"windows of {length}, {name}",
                "tokens_per_s": result.predictions / _median_seconds(call),
                "loss": result.nats_per_token,
                "loss_difference": result.nats_per_token - trained.measured["loss"],
            }
        )
    return rows


def cached_prefix(config: Config, trained: Trained, workdir: str) -> list[dict[str, Any]]:
    """The first token after a prefix, read as text and from its saved state."""
    graph, _ = abstract_model(config)
    model, tokenizer = nnx.merge(graph, trained.params), trained.corpus.tokenizer
    text = np.asarray(trained.corpus.train.tokens[:PREFIX], np.int32).tolist()
    path = os.path.join(workdir, "prefix.state")

    def read() -> Any:
        return generate(model, [text], max_new_tokens=1).tokens

    def load() -> Any:
        state = load_state(path, model, tokenizer)
        return generate(model, state=state, max_new_tokens=1).tokens

    save_state(path, generate(model, [text], max_new_tokens=0).state, model, tokenizer)
    tokens = [call() for call in (read, load)]  # compiles
    if not np.array_equal(*tokens):
        raise RuntimeError(f"a loaded state writes {tokens[1]}, reading its text {tokens[0]}")
    reading, loading = _median_seconds(read), _median_seconds(load)
    kilobytes = os.path.getsize(path) / 1e3
    return [
        {
            "name": "F prefix read",
            "changes": f"{len(text):,} tokens and one more: {1e3 * reading:.0f} ms",
            "tokens_per_s": len(text) / reading,
        },
        {
            "name": "F prefix kept",
            "changes": f"its state, {kilobytes:.0f} kB on disk: {1e3 * loading:.1f} ms",
            "tokens_per_s": len(text) / loading,
            "loss_difference": 0.0,
        },
    ]


def _median_seconds(call: Call) -> float:
    return statistics.median(seconds_of(call) for _ in range(5))


def truncation_bias(
    config: Config, trained: Trained, windows: Sequence[int] = (16, 64, 256, 1024)
) -> list[dict[str, float]]:
    """How far the gradient of truncated windows is from that of whole rows, on trained parameters.

    Returns:
      For each window: RMS of the difference over RMS of the whole gradient, and their cosine. A
      window of ``data.sequence_length`` truncates nothing.
    """
    source = BatchSource(
        trained.corpus.train, config.data, config.train.seed, trained.corpus.tokenizer.pad_id
    )
    batch = jax.tree.map(jnp.asarray, source[config.train.steps])  # of a step that was not taken
    rng = jax.random.key_data(jax.random.key(0))

    def gradient(window: int) -> np.ndarray:
        config.train.backward_window = window
        gradient_of = jax.jit(make_gradient(config))
        given = windows_of(batch, window) if window else batch
        leaves = jax.tree.leaves(gradient_of(trained.params, given, (), rng, jnp.zeros((), int))[2])
        return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in leaves])

    whole = gradient(0)
    rows = []
    for window in windows:
        cut = gradient(window)
        norms = np.linalg.norm(whole) * np.linalg.norm(cut)
        rows.append(
            {
                "window": window,
                "relative_difference": float(np.linalg.norm(cut - whole) / np.linalg.norm(whole)),
                "cosine": float(cut @ whole / norms),
            }
        )
    return rows


def show_bias(rows: list[dict[str, float]]) -> None:
    """Prints what `truncation_bias` found."""
    lines = [
        [f"{row['window']:,}", f"{row['relative_difference']:.1e}", f"{row['cosine']:.4f}"]
        for row in rows
    ]
    title = f"scaling, E: gradient of truncated windows of a row of {rows[-1]['window']:,} tokens"
    tables.show(title, ["window", "difference / whole", "cosine"], lines)


def state_errors(length: int = ERROR_LENGTH) -> list[dict[str, float]]:
    """RMS error of the recurrence's output against float64, by position, for dtypes of its state.

    Values have mean 1 and decay is slow (a half-life of `HALF_LIFE` tokens): the state grows large
    beside what a token adds.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    by_key = (1, length, 2, 8)
    arrays = (
        jax.random.normal(keys[0], by_key),
        jax.nn.sigmoid(jax.random.normal(keys[1], by_key)),
        1 + jax.random.normal(keys[2], by_key),
        jnp.full(by_key, -np.log(2) / HALF_LIFE, jnp.float32),
    )
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
        exact = np.asarray(gated_linear_recurrence(*wide, method="scan")[0])
    outputs = {
        "float32": gated_linear_recurrence(*arrays)[0],
        "bfloat16_by_chunk": gated_linear_recurrence(*arrays, state_dtype=jnp.bfloat16)[0],
        "bfloat16_by_token": _token_by_token(arrays),
    }
    rows = []
    end = 16
    while end <= length:
        part = exact[:, end // 2 : end]
        errors = {
            name: float(
                np.linalg.norm(np.asarray(output, np.float64)[:, end // 2 : end] - part)
                / np.linalg.norm(part)
            )
            for name, output in outputs.items()
        }
        rows.append({"position": end, **errors})
        end *= 4
    return rows


@jax.jit
def _token_by_token(arrays: Any) -> jax.Array:
    """As a decoder runs it that keeps its state in bfloat16."""

    def step(state: jax.Array, token: Any) -> tuple[jax.Array, jax.Array]:
        token = [x[:, None] for x in token]
        output, state = gated_linear_recurrence(
            *token, initial_state=state, state_dtype=jnp.bfloat16, method="scan"
        )
        return state, output[:, 0]

    _, _, heads, key_dim = arrays[0].shape
    start = jnp.zeros((len(arrays[0]), heads, key_dim, arrays[2].shape[-1]), jnp.bfloat16)
    return jax.lax.scan(step, start, [x.swapaxes(0, 1) for x in arrays])[1].swapaxes(0, 1)


def show_errors(rows: list[dict[str, float]]) -> None:
    """Prints what `state_errors` found."""
    lines = [
        [f"up to {row['position']:,}", *(f"{row[name]:.1e}" for name in list(row)[1:])]
        for row in rows
    ]
    headings = ["position", "float32 state", "bfloat16, each 64 tokens", "bfloat16, each token"]
    title = f"scaling, D: RMS error of the recurrence by position, half-life {HALF_LIFE:,} tokens"
    tables.show(title, headings, lines)
