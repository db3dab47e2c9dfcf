"""The training loop, from a configuration to the last checkpoint.

The order inside a step matters: dispatch step t, take the next batch, read the metrics of
step t - 1 while the device works; then, if due, evaluate, sample and save, all on the state
after step t. A checkpoint captures that state and the data position of step t + 1.
"""

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax

from simplernn_jax import config as config_lib
from simplernn_jax.config import Config, TrainConfig
from simplernn_jax.errors import UserError
from simplernn_jax.files import write_file
from simplernn_jax.parallel.distributed import is_coordinator
from simplernn_jax.training.display import open_display
from simplernn_jax.training.evaluate import Evaluation
from simplernn_jax.training.interruption import PollSignal, deferred_signals
from simplernn_jax.training.metrics import MetricsWriter
from simplernn_jax.training.periodic_actions import PeriodicAction, Validation, sample
from simplernn_jax.training.profiling import Profile
from simplernn_jax.training.reporter import Reporter
from simplernn_jax.training.run import Run
from simplernn_jax.training.step_statistics import RecompilationCounter
from simplernn_jax.training.train_step import StepMetrics, make_train_step


@dataclasses.dataclass(frozen=True)
class Result:
    """Outcome of a run."""

    step: int
    """Optimizer steps taken, those before a resumption included."""
    interrupted_by: str | None
    """Name of the signal that stopped it, or None if it ran to its end."""
    evaluation: Evaluation | None
    """Evaluation on the whole validation split; None if interrupted or if nothing is held out."""


def train(config: Config, workdir: str | os.PathLike[str]) -> Result:
    """Train, or resume training, in `workdir`.

    If `workdir` holds a checkpoint, the run resumes from it bit-exactly. SIGTERM and SIGINT save at
    the current step and return. The run ends early if the validation loss stops improving and
    ``train.early_stopping_patience`` is set.

    Several processes (`distributed`) call this together; SIGTERM to any process stops all of them
    at the same step (`supervisor` forwards SIGINT as SIGTERM). Only process 0 prints, and writes
    samples and metrics.

    Args:
      config: of the run; `config.validate` lists what it must satisfy.
      workdir: folder of the run, which is created if it does not exist.

    Returns:
      How the run ended.

    Raises:
      UserError: the data is unusable; the mesh does not fit; the checkpoint has a different model
        or data; too many consecutive losses or gradients were not finite; the disk is full.
    """
    with contextlib.ExitStack() as stack:
        path = os.fspath(workdir) if isinstance(workdir, os.PathLike) else workdir
        run = stack.enter_context(Run(config, path))
        metrics = None
        if is_coordinator():
            metrics = MetricsWriter(run.workdir, run.step)
            stack.callback(metrics.close)
        train_step = RecompilationCounter(
            "the train step", make_train_step(run.config, run.optimizer, run.mesh)
        )
        display = stack.enter_context(open_display(run.step, run.total_steps))
        reporter = Reporter(run, metrics, display, train_step)
        validation = Validation(run, reporter)
        with deferred_signals() as poll_signal:
            if is_coordinator() and not (run.has_ended and run.first_step):
                _write_config(run)
            signal = _train(run, train_step, reporter, validation, poll_signal)
        if signal:
            reporter.print_line(
                f"{signal}: saved at step {run.step} of {run.total_steps}; "
                "run the same command to resume"
            )
            return Result(run.step, signal, None)
        # All is saved: from here on a signal ends the process at once.
        evaluation = validation.evaluate_all()
        reporter.summarize(evaluation)
        return Result(run.step, None, evaluation)


def _train(
    run: Run,
    train_step: RecompilationCounter,
    reporter: Reporter,
    validation: Validation,
    poll_signal: PollSignal,
) -> str | None:
    """Take the remaining steps and save; return the name of the signal that ended the run."""
    train = run.config.train
    actions = (
        PeriodicAction(validation.evaluate, train.eval_every),
        PeriodicAction(lambda: sample(run, reporter), train.sample_every),
        PeriodicAction(run.save, train.save_every),
    )
    reporter.print_header()
    profile_steps = train.profile_steps if is_coordinator() else 0
    profile = Profile(run.workdir, profile_steps, reporter.print_line, reporter.timer.paused)
    with train_step, profile:
        _run_steps(run, train_step, reporter, poll_signal, actions, profile)
        signal, is_new = poll_signal(run.step), run.step > run.first_step
        is_evaluated = train.eval_every == 0 or run.history.last_step == run.step
        if is_new and run.has_ended and not is_evaluated:
            validation.evaluate()  # after a signal too: a resumed run would not evaluate this step
        if is_new or signal:  # before the profile is written: a preempted job has little time left
            run.save(wait=True)
    return poll_signal(run.step)


def _run_steps(
    run: Run,
    train_step: RecompilationCounter,
    reporter: Reporter,
    poll_signal: PollSignal,
    actions: Sequence[PeriodicAction],
    profile: Profile,
) -> None:
    """Take steps until the run ends or a signal is received."""
    if run.has_ended:
        return
    batch = run.next_batch()
    pending: StepMetrics | None = None
    reporter.timer.start()
    while not run.has_ended and not poll_signal(run.step):
        with profile.step(run.step + 1, run.state):
            run.state, metrics = train_step(run.state, batch)
        run.step += 1
        batch = run.next_batch()
        if pending is not None:
            _record_step(run.step - 1, pending, run, reporter)
        pending = metrics
        due = [action for action in actions if action.is_due(run)]
        if due:
            _record_step(run.step, metrics, run, reporter)
            pending = None
            with reporter.timer.paused():
                for action in due:
                    action.run()
    if pending is not None:
        _record_step(run.step, pending, run, reporter)
    reporter.timer.stop()


def _record_step(step: int, metrics: StepMetrics, run: Run, reporter: Reporter) -> None:
    """Wait for the metrics of a step, add them to the totals and report them."""
    host: Any = StepMetrics(*(x.item() for x in jax.device_get(metrics)))
    reporter.timer.tick(host.predictions)
    run.totals.add(host.loss, host.predictions, skipped=host.consecutive_skips > 0)
    check_skips(step, host.consecutive_skips, run.config.train)
    reporter.step(step, host)


def check_skips(step: int, consecutive: int, config: TrainConfig) -> None:
    """Raise `UserError` if consecutive skips have reached ``max_skipped_updates``."""
    if consecutive < config.max_skipped_updates:
        return
    steps = "1 step" if consecutive == 1 else f"{consecutive} consecutive steps"
    raise UserError(
        f"the loss or its gradient was not finite in {steps}, up to step {step} (batch {step - 1}, "
        f"seed {config.seed}); parameters were last updated at step {step - consecutive}: lower "
        "--config.optimizer.learning_rate"
    )


def _write_config(run: Run) -> None:
    path = os.path.join(run.workdir, "config.json")
    try:
        write_file(path, config_lib.to_json(run.config).encode())
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; remove it, or choose another --workdir"
        ) from error
