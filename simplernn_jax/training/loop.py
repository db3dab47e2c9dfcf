"""The training loop, from a configuration to the last checkpoint.

The order inside a step matters: dispatch step t, take the next batch, read the metrics of
step t - 1 while the device works; then, if due, evaluate, sample and save, all on the state
after step t. A checkpoint captures that state and the data position of step t + 1.
"""

import contextlib
import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
from flax import nnx
from jax.experimental import multihost_utils

from simplernn_jax import config as config_lib
from simplernn_jax.config import Config, TrainConfig
from simplernn_jax.data.chat_template import ChatTemplate, TemplateError
from simplernn_jax.errors import UserError
from simplernn_jax.files import write_file
from simplernn_jax.inference import generate_text
from simplernn_jax.models.language_model import abstract_model
from simplernn_jax.parallel.distributed import barrier, is_coordinator
from simplernn_jax.parallel.layer_layout import in_layout_of
from simplernn_jax.parallel.shardings import local_copy
from simplernn_jax.training.evaluate import Evaluation, Evaluator
from simplernn_jax.training.metrics import MetricsWriter
from simplernn_jax.training.profiling import Profile
from simplernn_jax.training.reporter import Reporter, open_display
from simplernn_jax.training.run import Run
from simplernn_jax.training.train_step import StepMetrics, TrainStep, make_train_step

SAMPLE_TEMPERATURE = 0.8
SIGNALS = (signal.SIGTERM, signal.SIGINT)

PollSignal = Callable[[int], str | None]
"""Returns the name of the signal that ends the run at a step, or None; called before each step."""


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
      OSError: a file of the workdir cannot be written.
    """
    with contextlib.ExitStack() as stack:
        path = os.fspath(workdir) if isinstance(workdir, os.PathLike) else workdir
        run = stack.enter_context(Run(config, path))
        metrics = None
        if is_coordinator():
            metrics = MetricsWriter(run.workdir, run.step)
            stack.callback(metrics.close)
        train_step = make_train_step(run.config, run.optimizer, run.mesh)
        display = stack.enter_context(open_display(run.step, run.total_steps))
        reporter = Reporter(run, metrics, display, train_step)
        trainer = Trainer(run, train_step, reporter)
        with deferred_signals() as poll_signal:
            if is_coordinator() and not (run.has_ended and run.first_step):
                _write_config(run)
            signal = trainer.train(poll_signal)
        if signal:
            reporter.print_line(
                f"{signal}: saved at step {run.step} of {run.total_steps}; "
                "run the same command to resume"
            )
            return Result(run.step, signal, None)
        # All is saved: from here on a signal ends the process at once.
        evaluation = trainer.evaluate_all()
        reporter.summarize(evaluation)
        return Result(run.step, None, evaluation)


class Trainer:
    """Takes the steps of a run, and evaluates, samples and saves between them."""

    def __init__(self, run: Run, train_step: TrainStep, reporter: Reporter) -> None:
        self._run = run
        self._train_step = train_step
        self._reporter = reporter
        self._evaluator = Evaluator(run.config, run.corpus.tokenizer.pad_id, run.mesh)

    def train(self, poll_signal: PollSignal) -> str | None:
        """Take the remaining steps and save; return the name of the signal that ended the run."""
        run, reporter, train = self._run, self._reporter, self._run.config.train
        reporter.print_header()
        profile_steps = train.profile_steps if is_coordinator() else 0
        with Profile(run.workdir, profile_steps, reporter.print_line) as profile:
            if not run.has_ended:
                self._take_steps(poll_signal, profile)
            signal, is_new = poll_signal(run.step), run.step > run.first_step
            is_evaluated = train.eval_every == 0 or run.history.last_step == run.step
            if is_new and run.has_ended and not is_evaluated:
                self.evaluate()  # after a signal too: a resumed run would not evaluate this step
            if is_new or signal:  # before the profile is written: a preempted job has little time
                run.save(wait=True)
        return poll_signal(run.step)

    def _take_steps(self, poll_signal: PollSignal, profile: Profile) -> None:
        """Take steps until the run ends or a signal is received."""
        run, timer, train = self._run, self._reporter.timer, self._run.config.train
        actions = (
            (self.evaluate, train.eval_every),
            (self.sample, train.sample_every),
            (run.save, train.save_every),
        )
        batch: Any = run.next_batch()  # None only after the last step
        pending: StepMetrics | None = None
        timer.start()
        while not run.has_ended and not poll_signal(run.step):
            with profile.step(run.step + 1, run.state):
                run.state, metrics = self._train_step(run.state, batch)
            run.step += 1
            batch = run.next_batch()
            if pending is not None:
                self._record(run.step - 1, pending)
            pending = metrics
            due = [action for action, every in actions if every and run.step % every == 0]
            if due and run.step < run.total_steps:
                self._record(run.step, metrics)
                pending = None
                with timer.paused():
                    for action in due:
                        action()
        if pending is not None:
            self._record(run.step, pending)

    def _record(self, step: int, metrics: StepMetrics) -> None:
        """Wait for the metrics of a step, add them to the totals and report them."""
        host: Any = StepMetrics(*(x.item() for x in jax.device_get(metrics)))
        self._reporter.timer.tick(host.predictions)
        is_skipped = host.consecutive_skips > 0
        self._run.totals.add(host.loss, host.predictions, skipped=is_skipped)
        check_skips(step, host.consecutive_skips, self._run.config.train)
        self._reporter.step(step, host)

    def evaluate(self) -> None:
        """Evaluate ``eval_tokens`` tokens, report them and decide on early stopping."""
        run, result = self._run, self._measure(self._run.config.train.eval_tokens)
        if result is not None:
            is_scheduled = run.step % run.config.train.eval_every == 0
            run.history.add(run.step, result, is_scheduled=is_scheduled)
            run.stopped_early = run.has_stopped_improving()
            self._reporter.evaluation("validation", result)

    def evaluate_all(self) -> Evaluation | None:
        """Evaluate and report the whole validation split; None if nothing is held out."""
        result = self._measure(limit_tokens=0)
        if result is not None:
            self._reporter.evaluation("held_out", result)
        return result

    def _measure(self, limit_tokens: int) -> Evaluation | None:
        """Evaluate the current state, unless that was done on the same tokens."""
        run, split = self._run, self._run.corpus.validation
        if split is None:
            return None
        predictions = min(limit_tokens or split.num_predictions, split.num_predictions)
        if run.latest_evaluation is not None:
            step, result = run.latest_evaluation
            if (step, result.predictions) == (run.step, predictions):
                return result
        result = self._evaluator(run.state.params, split, limit_tokens)
        run.latest_evaluation = run.step, result
        return result

    def sample(self) -> None:
        """Continue the configured prompt with the current model, on the coordinator."""
        run, train = self._run, self._run.config.train
        params = local_copy(run.state.params)
        if is_coordinator():
            prompt = train.sample_prompt
            graph, abstract = abstract_model(run.config.model)
            try:
                if template := run.config.data.template:
                    message = {"role": "user", "content": prompt}
                    prompt = ChatTemplate(template).render_next([message])
                (text,) = generate_text(
                    nnx.merge(graph, in_layout_of(abstract, params)),
                    run.corpus.tokenizer,
                    prompt,
                    max_new_tokens=train.sample_tokens,
                    temperature=SAMPLE_TEMPERATURE,
                    seed=train.seed,
                )
            except (UserError, TemplateError) as error:  # training goes on without a sample
                text = f" ({error})"
            self._reporter.sample(prompt + text)
        barrier("sample")


@contextlib.contextmanager
def deferred_signals() -> Iterator[PollSignal]:
    """Turn the first signal into a request; a second signal goes to the previous handler.

    In a distributed run, JAX's preemption service handles SIGTERM, and all processes agree on the
    step at which a signal to any of them ends the run.
    """
    if jax.distributed.is_initialized():
        first: list[int] = []

        def poll(step: int) -> str | None:
            # From 1 in every process: of a signal before the first call, JAX makes 1 the last step.
            first[:] = first or [step]
            is_last = multihost_utils.reached_preemption_sync_point(step - first[0] + 1)
            return "SIGTERM" if is_last else None

        yield poll
        return
    received: list[str] = []
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def request(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        restore()

    for number in SIGNALS:
        signal.signal(number, request)
    try:
        yield lambda step: received[0] if received else None
    finally:
        restore()


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
