"""Steps and intervals of a run with ``train.minutes``, from the measured speed of its parts."""

import itertools
import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from simplernn_jax.config import Config
from simplernn_jax.errors import UserError
from simplernn_jax.parallel.distributed import broadcast_from_coordinator, is_coordinator
from simplernn_jax.training.evaluate import Evaluator
from simplernn_jax.training.report import SAMPLES, compress_held_out, gather, sample
from simplernn_jax.training.run import Run
from simplernn_jax.training.train_step import TrainStep

CALIBRATION, MAX_TIMED_STEPS = 0.04, 2000
"""Part of the minutes in which steps are timed, as the speed of a laptop varies; most steps."""
MIN_STEPS = 20
END_SECONDS = 1.5
"""For the last checkpoint, the loss curve and the end of the process."""
_MAX_EVALUATION_SHARE = 0.08
"""Part of the time for evaluations before the last one."""
_SCORED_SHARE = 0.25


class Costs(NamedTuple):
    """Seconds that parts of a run take, once they are compiled."""

    step: float
    scored: float
    """A thousand tokens of an evaluation."""
    sample: float


def held_out_limit(config: Config) -> int:
    """Return the number of tokens scored at the end of a run; 0 for all.

    With ``train.minutes``, it is the larger of ``eval_tokens`` and a quarter of those trained on.
    """
    train, data = config.train, config.data
    trained = train.steps * data.batch_size * data.sequence_length
    limited = train.minutes and train.eval_tokens
    return max(train.eval_tokens, int(_SCORED_SHARE * trained)) if limited else 0


def measure(run: Run, train_step: TrainStep, evaluator: Evaluator) -> Costs:
    """Compile and time the parts of a run at step 0, which is left as it was.

    The steps of the schedule are an argument of the train step: it is not compiled again. All
    processes call this, and return what process 0 measured.
    """
    state, position = jax.tree.map(jnp.copy, run.state), run.position

    def seconds_of(steps: int) -> float:
        nonlocal state
        batch, begun = run.next_batch(), time.monotonic()
        for _ in range(steps):
            state, metrics = train_step(state, batch, *run.schedule)
            batch = run.next_batch()
            jax.device_get(metrics)
        return time.monotonic() - begun

    with ThreadPoolExecutor(1) as pool:  # a part of the report is made while XLA compiles
        compressed = pool.submit(compress_held_out, run) if is_coordinator() else None
        seconds_of(1)
    if compressed is not None:
        compressed.result()
    wanted = CALIBRATION * 60 * run.config.train.minutes / max(seconds_of(2) / 2, 1e-6)
    steps = broadcast_from_coordinator(int(min(max(wanted, 3), MAX_TIMED_STEPS)))
    per_step, per_token = seconds_of(steps) / steps, 0.0
    if split := run.corpus.validation:
        for limit in {run.config.train.eval_tokens, 0}:  # their batches may differ in shape
            times: list[float] = []
            tokens = 0
            initial = state.tuned.get("initial")
            twice = (
                evaluator.scores(state.params, split, limit, initial=initial) for _ in range(2)
            )
            for scores in itertools.islice(itertools.chain.from_iterable(twice), 3):
                float(scores.total)
                tokens += int(scores.batch.loss_mask.sum()) if times else 0
                times.append(time.monotonic())
            per_token = max(per_token, (times[-1] - times[0]) / max(tokens, 1))
    gathered, per_sample = gather(run, state), 0.0
    for _ in range(2 if gathered and is_coordinator() else 0):
        begun = time.monotonic()
        sample(run, gathered, 0, run.config.train.sample_prompt)
        per_sample = time.monotonic() - begun
    run.rewind(position)
    microseconds = (1e6 * per_step, 1e9 * per_token, 1e6 * per_sample)
    return Costs(*(broadcast_from_coordinator(int(min(x, 2e9))) / 1e6 for x in microseconds))


def set_schedule(run: Run, costs: Costs, started: float) -> None:
    """Set the schedule of a run whose minutes began at ``time.monotonic() == started``; see `plan`.

    Raises:
      UserError: as `plan`.
    """
    milliseconds = 60_000 * run.config.train.minutes - 1000 * (time.monotonic() - started)
    left = broadcast_from_coordinator(int(min(milliseconds, 2e9))) / 1000
    split = run.corpus.validation
    plan(run.config, costs, left, 0 if split is None else split.num_predictions)
    run.total_steps = run.config.train.steps
    logging.info("%d steps of %.3g ms, for %.4g s", run.total_steps, 1000 * costs.step, left)


def plan(config: Config, costs: Costs, seconds: float, held_out: int) -> None:
    """Set steps, warmup and the intervals that are not 0, for the `seconds` that are left.

    Args:
      config: with ``train.minutes``; it is changed.
      costs: seconds of the parts of the run.
      seconds: until the end of the process.
      held_out: number of predictions of the validation split.

    Raises:
      UserError: the time is not enough for `MIN_STEPS`; it names the minutes that suffice.
    """
    train, data = config.train, config.data
    per_token = costs.scored / 1000
    once = per_token * min(train.eval_tokens or held_out, held_out)
    evaluations = min(max(train.minutes, 4), 20)  # and saves: one a minute, within these limits
    most = _MAX_EVALUATION_SHARE * seconds / once if once else evaluations
    evaluations = max(1, int(min(evaluations, most)))
    free = seconds - END_SECONDS - (1 + SAMPLES) * costs.sample  # one halfway, and the report's
    free -= evaluations * once * (train.eval_every > 0)
    # At the end, all held-out text is scored, or a part that grows with the steps.
    per_step = costs.step + per_token * _SCORED_SHARE * data.batch_size * data.sequence_length
    train.steps = int(max(free / per_step, (free - per_token * held_out) / costs.step))
    if train.steps < MIN_STEPS:
        before, needed = 60 * train.minutes - free, MIN_STEPS * per_step
        raise UserError(
            f"--minutes={train.minutes:g}: too short: start, text, compilation and report take "
            f"{before:.0f} s here, and {MIN_STEPS} steps {needed:.1f} s; use at least "
            f"--minutes={math.ceil((before + needed) / 6) / 10:g}"
        )
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, max(1, train.steps // 10))
    for name, times in (("eval", evaluations), ("save", evaluations), ("sample", 2)):
        if getattr(train, f"{name}_every"):
            setattr(train, f"{name}_every", math.ceil(train.steps / times))
