"""Training for a given time: size and schedule follow from the text and the measured speed."""

import itertools
import math
import time
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from simplernn_jax.config import Config, by_field
from simplernn_jax.data.batches import round_up
from simplernn_jax.data.corpora import open_corpus, parse_mixture
from simplernn_jax.data.token_split import TokenSplit
from simplernn_jax.errors import UserError
from simplernn_jax.ops.native import has_fast_bfloat16
from simplernn_jax.parallel.distributed import broadcast_from_coordinator, is_coordinator
from simplernn_jax.training.evaluate import Evaluator
from simplernn_jax.training.report import gather, sample
from simplernn_jax.training.run import Run
from simplernn_jax.training.train_step import TrainStep

MIN_STEPS, MAX_TIMED_STEPS = 20, 2000
END_SECONDS = 2.5
"""For the last checkpoint, the report, and the end of the process."""
_TIMED_SHARE = 0.04
"""Part of the minutes in which steps are timed, as the speed of a laptop varies."""
_EVALUATION_SHARE, _HELD_OUT_SHARE = 0.08, 0.1
"""Largest parts of the time for evaluations during training and for the one at the end."""


class Costs(NamedTuple):
    """Seconds that parts of a run take, once they are compiled."""

    step: float
    scored: float
    """A thousand tokens of an evaluation."""


def set_schedule(run: Run, train_step: TrainStep, evaluator: Evaluator, started: float) -> None:
    """Set the schedule of a new run whose minutes began at `time.monotonic` `started`; see `plan`.

    All processes call this, and use what process 0 measured.
    """
    costs = measure(run, train_step, evaluator)
    milliseconds = 60_000 * run.config.train.minutes - 1000 * (time.monotonic() - started)
    left = broadcast_from_coordinator(int(min(milliseconds, 2e9))) / 1000
    split = run.corpus.validation
    plan(run.config, costs, left, 0 if split is None else split.num_predictions)
    run.total_steps = run.config.train.steps
    logging.info("%d steps of %.3g ms, for %.4g s", run.total_steps, 1000 * costs.step, left)


def measure(run: Run, train_step: TrainStep, evaluator: Evaluator) -> Costs:
    """Compile and time the parts of a run at step 0, which is left as it was.

    The steps of the schedule are an argument of the train step: it is not compiled again.
    """
    train, state, position = run.config.train, jax.tree.map(jnp.copy, run.state), run.position

    def seconds_per_step(steps: int) -> float:
        nonlocal state
        batch, begun = run.next_batch(), time.monotonic()
        for _ in range(steps):
            state, metrics = train_step(state, batch, run.schedule)
            batch = run.next_batch()
            jax.device_get(metrics)
        return (time.monotonic() - begun) / steps

    seconds_per_step(1)
    wanted = _TIMED_SHARE * 60 * train.minutes / max(seconds_per_step(2), 1e-6)
    steps = broadcast_from_coordinator(int(min(max(wanted, 3), MAX_TIMED_STEPS)))
    per_step, per_token = seconds_per_step(steps), 0.0

    def seconds_per_token(split: TokenSplit, limit: int) -> float:
        options = {"initial": state.tuned.get("initial")}
        begun, tokens = time.monotonic(), 0
        scores = evaluator.scores(state.params, split, limit, **options)
        for part in itertools.islice(scores, 2):
            float(part.total)
            tokens += int(part.batch.loss_mask.sum())
        return (time.monotonic() - begun) / max(tokens, 1)

    if (split := run.corpus.validation) is not None:
        limits = 2 * (train.eval_tokens, 0)  # batches of a limit and of all may differ in shape
        per_token = max([seconds_per_token(split, limit) for limit in limits][2:])
    if (gathered := gather(run, run.state)) and is_coordinator():
        sample(run, gathered, train.seed)
    run.rewind(position)
    microseconds = (int(min(1e6 * x, 2e9)) for x in (per_step, 1000 * per_token))
    return Costs(*(broadcast_from_coordinator(number) / 1e6 for number in microseconds))


def plan(config: Config, costs: Costs, left: float, held_out: int) -> None:
    """Set `SET_BY_MINUTES` and the warmup so that the run takes the time that is left.

    Args:
      config: with ``train.minutes``; it is changed.
      costs: seconds of the parts of the run.
      left: seconds until the end of the process.
      held_out: number of predictions of the validation split.

    Raises:
      UserError: the time is not enough for `MIN_STEPS`; it names the minutes that suffice.
    """
    train, per_token = config.train, max(costs.scored / 1000, 1e-9)
    evaluations = min(max(train.minutes, 4), 20)  # and saves: one a minute, within these limits
    once = per_token * min(train.eval_tokens or held_out, held_out)
    evaluations = max(1, int(min(evaluations, _EVALUATION_SHARE * left / max(once, 1e-9))))
    scored = max(train.eval_tokens, int(_HELD_OUT_SHARE * left / per_token))
    train.held_out_tokens = scored if scored < held_out else 0
    at_end = per_token * min(scored, held_out)
    free = left - END_SECONDS - at_end
    if train.eval_every:  # the last one is not repeated at the end if both score the same
        free -= (evaluations - (once == at_end)) * once
    steps = int(free / costs.step)
    if steps < MIN_STEPS:
        before, needed = 60 * train.minutes - free, MIN_STEPS * costs.step
        raise UserError(
            f"--minutes={train.minutes:g}: too short: start, text, compilation and report take "
            f"{before:.0f} s here, and {MIN_STEPS} steps {needed:.1f} s; use at least "
            f"--minutes={math.ceil((before + needed) / 6) / 10:g}"
        )
    train.minutes, train.epochs, train.steps = 0.0, 0.0, steps
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, max(1, steps // 10))
    for name, times in (("eval", evaluations), ("save", evaluations), ("sample", 2)):
        if getattr(train, f"{name}_every"):
            setattr(train, f"{name}_every", math.ceil(steps / times))


class Size(NamedTuple):
    """Layers of a candidate, and the tokenizer that suits them."""

    num_layers: int
    width: int
    num_heads: int
    tokenizer: str
    """For texts of at least `_BYTE_LEVEL` bytes; shorter ones are trained on by bytes."""
    bytes_per_token: float

    @property
    def parameters(self) -> int:
        """Parameters apart from the embedding."""
        return 14 * self.num_layers * self.width**2


SIZES = (
    Size(2, 64, 2, "bpe:512", 1.9),
    Size(3, 96, 3, "bpe:1024", 2.3),
    Size(4, 128, 4, "bpe:1024", 2.4),
    Size(6, 192, 4, "bpe:2048", 3.0),
    Size(6, 320, 5, "bpe:4096", 3.4),
    Size(6, 512, 8, "bpe:8192", 3.8),
)
"""The third is the size of `configs/base.py`, the fourth of `hour`, the last about `small`."""
_BYTE_LEVEL = 2_000_000
_START_SECONDS = 20
"""Estimated time for start, tokenization and compilation, besides a part of the minutes."""
_PARAMETERS = 0.15
"""Most parameters per square root of the operations of a run. Compute-optimal sizes, with 1.5
tokens per parameter, have 0.33; on a CPU, smaller ones were measured to be better."""
_FEW_PASSES, _MANY_PASSES = 4, 25
"""Passes over the text from which dropout helps, and from which small models need more of it."""


def choose(seconds: float, num_bytes: int, flops: float) -> Size:
    """Choose the size for `seconds` of steps at `flops` operations per second on `num_bytes`.

    With more parameters than bytes of text, a model would overfit.
    """
    limit = min(_PARAMETERS * math.sqrt(seconds * flops), num_bytes)
    return [size for size in SIZES if size is SIZES[0] or size.parameters <= limit][-1]


def regularization(passes: float, width: int) -> tuple[float, float]:
    """Return dropout and weight decay for so many passes over a text (docs/notes.md)."""
    if passes < _FEW_PASSES:
        return 0.0, 0.1
    return 0.1 if passes < _MANY_PASSES and width <= 128 else 0.2, 0.3


def auto_size(config: Config, workdir: str, size: Size | None = None) -> None:
    """Set the fields of a new run that are not given to `size`, or to what `choose` finds.

    Raises:
      UserError: there are no minutes, a model is given, or the text cannot be found.
    """
    train, data, before = config.train, config.data, by_field(config)
    if train.init_from or not train.minutes:
        raise UserError("--size=auto: needs --minutes, and no config.train.init_from")
    sources = [part for part, _ in parse_mixture(data.source) or [(data.source, 1.0)]]
    exclude = (workdir,) if workdir else ()
    corpora = (open_corpus(replace(data, source=each), exclude=exclude) for each in sources)
    num_bytes = sum(corpus.total_bytes for corpus in corpora)
    flops = broadcast_from_coordinator(int(measure_flops() / 1e6)) * 1e6
    seconds = max(57 * train.minutes - _START_SECONDS, 15 * train.minutes)
    size = size or choose(seconds, num_bytes, flops)
    tokens = seconds * flops / (6 * size.parameters)
    by_bytes = num_bytes < _BYTE_LEVEL
    passes = tokens * (1 if by_bytes else size.bytes_per_token) / max(num_bytes, 1)
    dropout, decay = regularization(passes, size.width)
    is_fast = has_fast_bfloat16() or jax.default_backend() != "cpu"
    chosen = {
        "hidden_dim": size.width,
        "key_dim": size.width,
        "value_dim": size.width,
        "num_layers": size.num_layers,
        "num_heads": size.num_heads,
        "mlp_dim": 4 * size.width,
        "dropout": dropout,
        "precision": "bfloat16" if is_fast else "float32",
        "batch_size": round_up(8, jax.device_count()),
        "tokenizer": "byte" if by_bytes else size.tokenizer,
        # Fewer than five thousand steps of 512 are worse than twice as many of 256.
        "sequence_length": 512 if tokens > 5000 * 8 * 512 else 256,
        "name": "muon",
        "learning_rate": 1.2e-2,
        "warmup_steps": 100,
        "weight_decay": decay,
    }
    if config.optimizer.is_given("name") and config.optimizer.name != "muon":
        del chosen["learning_rate"]
    for part in (config.model, data, config.optimizer):
        for name, value in chosen.items():
            if name in vars(part) and not part.is_given(name):
                setattr(part, name, value)
    changed = [f"{key}={new}" for key, new in by_field(config).items() if new != before[key]]
    logging.info("size for %.3g MB of text: %s", num_bytes / 1e6, ", ".join(changed))


def measure_flops() -> float:
    """Return the operations per second of train steps: half of those of large float32 matmuls.

    In bfloat16, where that is fast, steps were measured to be 1.4 times as fast.
    """
    x, best = jnp.ones((1024, 1024), jnp.float32), math.inf
    multiply = jax.jit(lambda a: (a @ a) * 1e-3)
    for _ in range(50):
        begun = time.monotonic()
        multiply(x).block_until_ready()
        best = min(best, time.monotonic() - begun)
    return (0.7 if has_fast_bfloat16() else 0.5) * 2 * 1024**3 / best
