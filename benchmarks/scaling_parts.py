"""Parts of the scaling benchmark besides its trainings."""

import dataclasses
import os
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.corpus_training import Trained
from benchmarks.measure import Call, seconds_of
from benchmarks.train_steps import BY_SCAN, random_batch
from simplernn_jax.config import Config
from simplernn_jax.data.batches import BatchSource
from simplernn_jax.data.evaluation_batches import Contexts
from simplernn_jax.inference import generate, load_state, save_state
from simplernn_jax.ops import gated_linear_recurrence
from simplernn_jax.training.accumulation import windows_of
from simplernn_jax.training.evaluate import Evaluator
from simplernn_jax.training.gradient import make_gradient
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.train_step import init_train_state

EAGER_TOKENS = 16
PREFIX = 4096
ERROR_LENGTH = 16384
HALF_LIFE = 4096


def eager_step(config: Config) -> dict[str, Any]:
    """Time loss and gradient without compilation, one token after another."""
    short = dataclasses.replace(config.data, sequence_length=EAGER_TOKENS)
    batch = jax.tree.map(jnp.asarray, random_batch(dataclasses.replace(config, data=short)))
    optimizer = make_optimizer(config.optimizer, 1)
    state = jax.jit(lambda: init_train_state(config, optimizer))()
    gradient_of = make_gradient(config, BY_SCAN)
    with jax.disable_jit():
        seconds = [
            seconds_of(lambda: gradient_of(state.params, batch, (), state.rng, state.step))
            for _ in range(3)
        ]
    return {
        "technique": "C eager, one token at a time",
        "change": "no compilation, no optimizer",
        "tokens/s": batch.tokens.size / min(seconds),
    }


def evaluations(config: Config, trained: Trained) -> list[dict[str, Any]]:
    """Evaluate the plain run with the state carried, and by windows from a zero state."""
    evaluator = Evaluator(config, trained.corpus.tokenizer.pad_id)
    length, limit = config.data.sequence_length, config.train.eval_tokens
    held_out: Any = trained.corpus.validation
    rows = []
    for stride in (0, length // 4, length // 2, length):
        windows = Contexts(length, stride) if stride else None

        def call(windows: Contexts | None = windows) -> Any:
            return evaluator(trained.params, held_out, limit, windows=windows)

        result = call()  # compiles
        rows.append(
            {
                "technique": "A evaluation",
                "change": f"windows of {length}, stride {stride}" if stride else "state carried",
                "tokens/s": result.predictions / _median_seconds(call),
                "nats/token": result.nats_per_token,
                "difference": result.nats_per_token - trained.measured["nats/token"],
            }
        )
    return rows


def cached_prefix(trained: Trained, workdir: str) -> list[dict[str, Any]]:
    """Time the first token after a prefix, prefilled and from its saved state."""
    model, tokenizer = trained.model(), trained.corpus.tokenizer
    text = np.asarray(trained.corpus.train.tokens[:PREFIX], np.int32).tolist()
    path = os.path.join(workdir, "prefix.state")

    def prefill() -> Any:
        return generate(model, [text], max_new_tokens=1).tokens

    def load() -> Any:
        state = load_state(path, model, tokenizer)
        return generate(model, state=state, max_new_tokens=1).tokens

    save_state(path, generate(model, [text], max_new_tokens=0).state, model, tokenizer)
    tokens = [call() for call in (prefill, load)]  # compiles
    if not np.array_equal(*tokens):
        raise RuntimeError(f"token {tokens[1]} from a loaded state, {tokens[0]} from its text")
    size = f"state of {os.path.getsize(path) / 1e3:.0f} kB loaded"
    rows = []
    for name, what, call in (
        ("F prefix prefilled", f"{len(text):,} tokens", prefill),
        ("F prefix cached", size, load),
    ):
        seconds = _median_seconds(call)
        change = f"{what} and one generated: {1e3 * seconds:.1f} ms"
        rows.append({"technique": name, "change": change, "tokens/s": len(text) / seconds})
    return rows


def _median_seconds(call: Call) -> float:
    return statistics.median(seconds_of(call) for _ in range(5))


def truncation_bias(
    config: Config, trained: Trained, windows: Sequence[int] = (16, 64, 256, 1024)
) -> list[dict[str, float]]:
    """Compare the gradient of truncated windows with that of whole sequences, after training.

    The difference is an RMS, relative to the whole gradient. A window of ``data.sequence_length``
    truncates nothing.
    """
    source = BatchSource(
        trained.corpus.train, config.data, config.train.seed, trained.corpus.tokenizer.pad_id
    )
    batch = jax.tree.map(jnp.asarray, source[config.train.steps])  # not trained on
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
                "difference / whole": float(np.linalg.norm(cut - whole) / np.linalg.norm(whole)),
                "cosine": float(cut @ whole / norms),
            }
        )
    return rows


def state_errors(length: int = ERROR_LENGTH) -> list[dict[str, Any]]:
    """RMS error of the recurrence's output against float64, by position and dtype of the state.

    Values have mean 1 and decay is slow (a half-life of `HALF_LIFE` tokens): the state grows large
    beside the contribution of one token.
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
        "bfloat16, each 64 tokens": gated_linear_recurrence(*arrays, state_dtype=jnp.bfloat16)[0],
        "bfloat16, each token": _token_by_token(arrays),
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
        rows.append({"position": f"up to {end:,}", **errors})
        end *= 4
    return rows


@jax.jit
def _token_by_token(arrays: Any) -> jax.Array:
    """The recurrence as a decoder with a bfloat16 state computes it."""

    def step(state: jax.Array, token: Any) -> tuple[jax.Array, jax.Array]:
        token = [x[:, None] for x in token]
        output, state = gated_linear_recurrence(
            *token, initial_state=state, state_dtype=jnp.bfloat16, method="scan"
        )
        return state, output[:, 0]

    _, _, heads, key_dim = arrays[0].shape
    start = jnp.zeros((len(arrays[0]), heads, key_dim, arrays[2].shape[-1]), jnp.bfloat16)
    return jax.lax.scan(step, start, [x.swapaxes(0, 1) for x in arrays])[1].swapaxes(0, 1)
