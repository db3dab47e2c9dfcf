"""Train steps on random tokens, compiled to be timed or analyzed, and short trainings on text."""

import dataclasses
import functools
import itertools
import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from simplernn_jax.cli import config_files
from simplernn_jax.config import Config, ModelConfig
from simplernn_jax.data.batches import Batch, document_ends, make_batches
from simplernn_jax.data.token_store import TokenizedCorpus, TokenSplit
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.language_model import abstract_model
from simplernn_jax.parallel.mesh import check_fits, make_mesh
from simplernn_jax.training import train_step
from simplernn_jax.training.evaluate import Evaluator
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.preparation import prepare

from .measure import Call

TIMED_STEPS = 20
_STEPS = 1000
_OPERATION = re.compile(
    r" = (\(.*?\)|\S+) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
    r"|collective-broadcast)(?:-start)?\("
)
_ARRAY = re.compile(r"[a-z]+(\d*)(?:e\d\w*)?\[([\d,]*)\]")
"""``pred`` has no number of bits and takes a byte."""


def with_method(config: Config, method: str) -> Config:
    """Change the method of the recurrence."""
    return config if method == "auto" else change(config, mixer_options={"method": method})


def change(config: Config, **fields: Any) -> Config:
    """Set these fields, of any section, by name; return `config`."""
    for name, value in fields.items():
        section = next(part for part in vars(config).values() if hasattr(part, name))
        setattr(section, name, value)
    return config


def load_config(name: str, batch: int, length: int, **fields: Any) -> Config:
    """``configs/NAME.py`` on one device, with random windows and these fields of any section."""
    config = config_files.load_config(name)
    config.mesh.data = 1
    return change(config, mode="window", batch_size=batch, sequence_length=length, **fields)


def random_batch(config: Config) -> Batch:
    """Random tokens, one document per sequence, every prediction counted."""
    sizes = (config.data.batch_size, config.data.sequence_length, config.model.vocab_size)
    batch = random_documents(np.random.default_rng(0), *sizes, begins=0.0)
    return batch._replace(reset=np.ones(sizes[0], bool))


def document_texts(split: TokenSplit, tokenizer: Tokenizer) -> list[str]:
    """Texts of the documents of a split."""
    bounds = zip(split.document_starts, document_ends(split), strict=True)
    return [tokenizer.decode(split.tokens[start:end]) for start, end in bounds]


def random_documents(
    draw: np.random.Generator, size: int, length: int, vocab_size: int, begins: Any = 0.2
) -> Batch:
    """Random tokens of documents that begin at each token with probability `begins`."""
    tokens = draw.integers(0, vocab_size, (size, length + 1), np.int32)
    starts = draw.random((size, length + 1)) < begins
    ids = np.cumsum(starts[:, :-1], axis=1, dtype=np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], ~starts[:, 1:], ids, starts[:, 0])


def count_parameters(config: Config) -> int:
    """Number of parameters of the model; an embedding that is also the head counts once."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_model(config.model)[1]))


def abstract_state(model: ModelConfig) -> Any:
    """Shapes of the decoder state of one sequence."""
    return nnx.eval_shape(lambda: LanguageModel(model, rngs=nnx.Rngs(0)).initial_state(1))


def lower_step(
    config: Config, batch: Batch | None = None, steps: int = _STEPS
) -> tuple[Any, Callable[[], Any]]:
    """Our train step on the mesh of `config`, lowered, and a function that makes its first state.

    `batch` is random by default; `steps` is the length of the learning rate schedule, at whose end
    further steps stay.
    """
    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, steps, mesh)
    shardings = train_step.state_shardings(config, optimizer, mesh)
    init = functools.partial(train_step.init_train_state, config, optimizer)
    step: Any = train_step.make_train_step(config, optimizer, mesh)
    lowered = step.lower(jax.eval_shape(init), batch or random_batch(config))
    return lowered, jax.jit(init, out_shardings=shardings)


def compile_quickly(config: Config) -> Any:
    """Our train step on the mesh of `config`, compiled to be analyzed and not to be run."""
    # Buffers and collectives are settled before the backend generates code.
    return lower_step(config)[0].compile({"xla_backend_optimization_level": 0})


def megabytes(program: Any) -> float:
    """Working memory of a compiled program on one device, by XLA's analysis, in 1e6 bytes."""
    return float(program.memory_analysis().temp_size_in_bytes) / 1e6


def collectives(text: str) -> Counter[tuple[str, int]]:
    """``{(kind, bytes of the result on one device): count}``, array by array.

    XLA may combine several all-reduces into one operation: each array counts as one here. A
    collective in a loop counts once, however often the loop runs.
    """
    found: Counter[tuple[str, int]] = Counter()
    for arrays, kind in _OPERATION.findall(text):
        for bits, shape in _ARRAY.findall(arrays):
            size = math.prod(int(n) for n in shape.split(",") if n)
            found[kind, size * max(int(bits or 8), 8) // 8] += 1
    return found


def repeated(program: Any, state: Any, batch: Batch) -> Call:
    """Calls of ``(state, batch) -> (state, metrics)``, each of which continues from the last."""
    batch = jax.device_put(batch)

    def call() -> Any:
        nonlocal state
        state, metrics = program(state, batch)
        return metrics

    return call


def our_step(config: Config) -> Call:
    """The step of `simplernn_jax.training` on random tokens, compiled."""
    lowered, make_state = lower_step(config)
    return repeated(lowered.compile(), make_state(), random_batch(config))


class Trained(NamedTuple):
    """Result of `train_on_corpus`."""

    config: Config
    params: nnx.State
    corpus: TokenizedCorpus
    measured: dict[str, float]
    """``memory MB`` as `megabytes`; ``tokens/s``, by the median time of `TIMED_STEPS` steps,
    without the first step; held-out loss in ``nats/token`` and ``bits/byte``."""

    def model(self) -> LanguageModel:
        """The trained model."""
        return nnx.merge(abstract_model(self.config.model)[0], self.params)


def train_on_corpus(config: Config, workdir: str, seed: int = 0) -> Trained:
    """Take all steps of `config`, then evaluate on ``train.eval_tokens`` held-out tokens.

    `workdir` keeps the tokenized corpus, whose split does not depend on `seed`.
    """
    config, corpus, _ = prepare(config, workdir)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
    mesh, pad_id = make_mesh(config.mesh), corpus.tokenizer.pad_id
    check_fits(config, mesh)
    batches = make_batches(corpus.train, config.data, seed, pad_id)
    first = next(batches)
    lowered, make_state = lower_step(config, first, config.train.steps)
    step = lowered.compile()
    state, _ = jax.block_until_ready(step(make_state(), first))
    seconds = []
    for done in range(1, config.train.steps, TIMED_STEPS):
        steps = min(TIMED_STEPS, config.train.steps - done)
        started = time.perf_counter()
        taken = take_steps(step, state, itertools.islice(batches, steps))
        state, _ = jax.block_until_ready(taken)
        seconds.append((time.perf_counter() - started) / steps)
    held_out: Any = corpus.validation  # by default there is one
    evaluation = Evaluator(config, pad_id, mesh)(state.params, held_out, config.train.eval_tokens)
    tokens = config.data.batch_size * config.data.sequence_length
    measured = {
        "memory MB": megabytes(step),
        "tokens/s": tokens / statistics.median(seconds),
        "nats/token": evaluation.nats_per_token,
        "bits/byte": evaluation.bits_per_byte,
    }
    return Trained(config, state.params, corpus, measured)


def measure_on_corpus(config: Config, workdir: str) -> dict[str, float]:
    """Measurements of `train_on_corpus`; for `on_simulated_devices`."""
    return train_on_corpus(config, workdir).measured


def take_steps(
    step: train_step.TrainStep, state: train_step.TrainState, batches: Iterable[Batch]
) -> tuple[train_step.TrainState, list[train_step.StepMetrics]]:
    """Take one step per batch, without waiting for the metrics, which stay on the device."""
    metrics = []
    for batch in batches:
        state, step_metrics = step(state, batch)
        metrics.append(step_metrics)
    return state, metrics
