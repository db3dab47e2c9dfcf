"""Parts of the scaling benchmark besides its trainings."""

import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.corpus_training import Trained
from benchmarks.measure import Effort, alternate, median, seconds_of
from benchmarks.tables import Row
from benchmarks.train_steps import BY_SCAN, change, random_batch
from simplernn_jax.config import Config
from simplernn_jax.data.batches import BatchSource
from simplernn_jax.data.evaluation_batches import Contexts
from simplernn_jax.inference import generate, load_state, save_state
from simplernn_jax.ops import gated_linear_recurrence
from simplernn_jax.training.accumulation import windows_of
from simplernn_jax.training.evaluate import Evaluator
from simplernn_jax.training.gradient import make_gradient, make_model

EAGER_TOKENS = 16
EFFORT = Effort(1, 4)
PREFIX = 4096
ERROR_LENGTH = 16384
HALF_LIFE = 4096


def gradient_arguments(params: nnx.State, batch: Any) -> Any:
    """Arguments of the function that `make_gradient` returns."""
    batch, key = jax.tree.map(jnp.asarray, batch), jax.random.key_data(jax.random.key(0))
    return params, batch, (), key, jnp.zeros((), int)


def eager_step(config: Config) -> Row:
    """Time loss and gradient without compilation, one token after another."""
    config = change(config, sequence_length=EAGER_TOKENS)
    params = nnx.state(make_model(config, nnx.Rngs(0)), nnx.Param)
    arguments = gradient_arguments(params, random_batch(config))
    gradient_of = make_gradient(config, BY_SCAN)
    with jax.disable_jit():
        seconds = min(seconds_of(lambda: gradient_of(*arguments)) for _ in range(3))
    return {
        "technique": "C eager, one token at a time",
        "change": "no compilation, no optimizer",
        "tokens/s": config.data.batch_size * EAGER_TOKENS / seconds,
    }


def evaluations(config: Config, trained: Trained) -> list[Row]:
    """Evaluate the plain run with the state carried, and by windows from a zero state."""
    evaluator = Evaluator(config, trained.corpus.tokenizer.pad_id)
    length = config.data.sequence_length
    given = (trained.params, trained.corpus.validation, config.train.eval_tokens)
    rows: list[Row] = []
    for stride in (0, length // 4, length // 2, length):
        windows = Contexts(length, stride) if stride else None
        call: Any = functools.partial(evaluator, *given, windows=windows)  # type: ignore[arg-type]
        result, loss = call(), call().nats_per_token
        what = f"windows of {length}, stride {stride}" if stride else "state carried"
        row = {"technique": "A evaluation", "change": what, "nats/token": loss}
        row["tokens/s"] = result.predictions / median(alternate({"": call}, EFFORT)[""])
        rows.append(row | {"difference": loss - trained.measured["nats/token"]})
    return rows


def cached_prefix(trained: Trained, workdir: str) -> list[Row]:
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
    for what, blocks in alternate({f"{len(text):,} tokens": prefill, size: load}, EFFORT).items():
        name = "F prefix cached" if what == size else "F prefix prefilled"
        change = f"{what} and one generated: {1e3 * median(blocks):.1f} ms"
        rows.append({"technique": name, "change": change, "tokens/s": len(text) / median(blocks)})
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
        config.train.backward_window = window
        given = windows_of(batch, window) if window else batch
        gradient_of: Any = jax.jit(make_gradient(config))
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
    beside the contribution of one token.
    """
    draw = np.random.default_rng(0)
    q, k, v = draw.normal(size=(3, 1, length, 2, 8))
    wide = (q, 1 / (1 + np.exp(k)), 1 + v, np.full_like(q, -np.log(2) / HALF_LIFE))
    arrays = [jnp.float32(x) for x in wide]
    with jax.enable_x64(True):
        rounded = [jnp.float64(np.float32(x)) for x in wide]
        exact = np.asarray(gated_linear_recurrence(*rounded, method="scan")[0])

    def token_by_token(state: jax.Array, token: Any) -> tuple[jax.Array, jax.Array]:
        """A step of a decoder."""
        options: Any = {"initial_state": state, "state_dtype": jnp.bfloat16, "method": "scan"}
        output, state = gated_linear_recurrence(*(x[:, None] for x in token), **options)
        return state, output[:, 0]

    start = jnp.zeros((1, 2, 8, 8), jnp.bfloat16)
    tokens = [x.swapaxes(0, 1) for x in arrays]
    outputs = {
        "float32": gated_linear_recurrence(*arrays)[0],
        "bfloat16, each 64 tokens": gated_linear_recurrence(*arrays, state_dtype=jnp.bfloat16)[0],
        "bfloat16, each token": jax.lax.scan(token_by_token, start, tokens)[1].swapaxes(0, 1),
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
