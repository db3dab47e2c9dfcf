"""The training loop, from a configuration to the last checkpoint.

The order inside a step matters: dispatch step t, take the next batch, read the metrics of
step t - 1 while the device works; then, if due, evaluate, sample and save, all on the state
after step t. A checkpoint captures that state and the data position of step t + 1.
"""

import contextlib
import dataclasses
import math
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from simplernn_jax import config as config_lib
from simplernn_jax.config import Config, TrainConfig
from simplernn_jax.errors import UserError, counted
from simplernn_jax.files import write_file
from simplernn_jax.parallel.distributed import barrier, is_coordinator
from simplernn_jax.parallel.mesh import describe
from simplernn_jax.project import name_commands
from simplernn_jax.training.display import Display, StepTimer, align, format_duration, open_display
from simplernn_jax.training.evaluate import Evaluation, Evaluator
from simplernn_jax.training.metrics import MetricsWriter, plot_loss
from simplernn_jax.training.minutes import set_schedule
from simplernn_jax.training.optimizer import learning_rate_schedule
from simplernn_jax.training.report import gather, sample, write_report
from simplernn_jax.training.run import Run
from simplernn_jax.training.train_step import StepMetrics, TrainStep, make_train_step
from simplernn_jax.training.tuning import save_tuned, trained_part

SIGNALS = (signal.SIGTERM, signal.SIGINT)

WARMUP_STEPS = 2
"""Steps of this process before a profile: the first compiles, the second warms up."""

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
    """Evaluation at the end of the run; None if interrupted or if nothing is held out."""


def train(
    config: Config, workdir: str | os.PathLike[str], *, started: float | None = None
) -> Result:
    """Train, or resume training, in `workdir`.

    If `workdir` holds a checkpoint, the run resumes from it bit-exactly. SIGTERM and SIGINT save at
    the current step and return. The run ends early if the validation loss stops improving and
    ``train.early_stopping_patience`` is set.

    Several processes (`distributed`) call this together; SIGTERM to any process stops all of them
    at the same step (`supervisor` forwards SIGINT as SIGTERM). Only process 0 prints, and writes
    samples and metrics.

    Args:
      config: of the run; `simplernn_jax.config` documents the limits of its fields.
      workdir: folder of the run, which is created if it does not exist.
      started: `time.monotonic` of the beginning of ``train.minutes``; None: this call.

    Returns:
      How the run ended.

    Raises:
      UserError: the data is unusable; the mesh does not fit; the checkpoint has a different model
        or data; too many consecutive losses or gradients were not finite; the disk is full.
      OSError: a file of the workdir cannot be written.
    """
    started = time.monotonic() if started is None else started
    with contextlib.ExitStack() as stack:
        path = os.fspath(workdir) if isinstance(workdir, os.PathLike) else workdir
        run = stack.enter_context(Run(config, path))
        train_step = make_train_step(run.config, run.optimizer, run.mesh, with_steps=True)
        evaluator = Evaluator(run.config, run.corpus.tokenizer.pad_id, run.mesh)
        metrics = None
        if is_coordinator():
            metrics = MetricsWriter(run.workdir, run.step)
            stack.callback(metrics.close)
        if run.config.train.minutes:
            set_schedule(run, train_step, evaluator, started)
        display = stack.enter_context(open_display(run.step, run.total_steps))
        trainer = Trainer(run, train_step, evaluator, metrics, display)
        with deferred_signals() as poll_signal:
            if is_coordinator() and not (run.has_ended and run.first_step):
                path = os.path.join(run.workdir, "config.json")
                write_file(path, config_lib.to_json(run.config).encode())
            stopped_by = trainer.train(poll_signal)
        if stopped_by:
            where = f"step {run.step} of {run.total_steps}"
            display.print_line(f"{stopped_by}: saved at {where}; run the same command to resume")
            return Result(run.step, stopped_by, None)
        # All is saved: from here on a signal ends the process at once.
        evaluation = trainer.evaluate_all()
        display.print_line("done\n" + align(trainer.summary(evaluation)))
        return Result(run.step, None, evaluation)


class Trainer:
    """Takes the steps of a run; evaluates, samples and saves between them; reports on all of it.

    `metrics` is None in processes that are not the coordinator.
    """

    def __init__(
        self,
        run: Run,
        train_step: TrainStep,
        evaluator: Evaluator,
        metrics: MetricsWriter | None,
        display: Display,
    ) -> None:
        config = run.config
        self._run = run
        self._metrics = metrics
        self._display = display
        self._timer = StepTimer(0.0 if metrics is None else metrics.seconds)
        self._train_step, self._evaluator = train_step, evaluator
        self._learning_rate = learning_rate_schedule(config.optimizer, *run.schedule)
        size = counted(sum(leaf.size for leaf in jax.tree.leaves(run.state.params)), "parameter")
        mixer = config.model.mixer.replace("simple_rnn", "SimpleRNN")
        self._model = f"{config.model.block} {mixer} model, {size}"
        self._evaluated: Any = (None, None)
        """The last evaluation, after its step and its number of predictions."""

    def train(self, poll_signal: PollSignal) -> str | None:
        """Take the remaining steps and save; return the name of the signal that ended the run."""
        run, train = self._run, self._run.config.train
        self._print_header()
        with contextlib.ExitStack() as profile:
            if not run.has_ended:
                self._take_steps(poll_signal, profile)
            signal, is_new = poll_signal(run.step), run.step > run.first_step
            is_evaluated = train.eval_every == 0 or run.history.last_step == run.step
            if is_new and run.has_ended and not is_evaluated:
                self.evaluate()  # after a signal too: a resumed run would not evaluate this step
            if is_new or signal:  # before the profile is written: a preempted job has little time
                run.save(wait=True)
        return poll_signal(run.step)

    def _take_steps(self, poll_signal: PollSignal, profile: contextlib.ExitStack) -> None:
        """Take steps until the run ends or a signal is received."""
        run, train = self._run, self._run.config.train
        actions = (
            (self.evaluate, train.eval_every),
            (self.sample, train.sample_every),
            (run.save, train.save_every),
        )
        batch: Any = run.next_batch()  # None only after the last step
        schedule = run.schedule
        pending: StepMetrics | None = None
        while not run.has_ended and not poll_signal(run.step):
            self._start_or_stop(profile)
            with jax.profiler.StepTraceAnnotation("train", step_num=run.step + 1):
                run.state, metrics = self._train_step(run.state, batch, schedule)
            run.step += 1
            batch = run.next_batch()
            if pending is not None:
                self._record(run.step - 1, pending)
            pending = metrics
            due = [action for action, every in actions if every and run.step % every == 0]
            if due and run.step < run.total_steps:
                self._record(run.step, metrics)
                pending = None
                with self._timer.paused():
                    for action in due:
                        action()
        if pending is not None:
            self._record(run.step, pending)

    def _start_or_stop(self, profile: contextlib.ExitStack) -> None:
        """Profile ``profile_steps`` steps of this process, whole ones, for TensorBoard."""
        run, steps = self._run, self._run.config.train.profile_steps
        taken = run.step - run.first_step - WARMUP_STEPS
        if steps and taken in (0, steps) and is_coordinator():
            jax.block_until_ready(run.state)
            if taken == steps:
                profile.close()
                return
            folder = os.path.join(run.workdir, "tensorboard")
            needed = f"`tensorboard --logdir {run.workdir}` (pip install tensorboard xprof)"
            line = f"profile: {folder}/plugins/profile; see {needed}"
            profile.callback(self._display.print_line, line)
            profile.enter_context(jax.profiler.trace(folder))

    def _record(self, step: int, on_device: StepMetrics) -> None:
        """Wait for the metrics of a step, add them to the totals and report them."""
        metrics: Any = StepMetrics(*(x.item() for x in jax.device_get(on_device)))
        run, timer, train = self._run, self._timer, self._run.config.train
        timer.tick(metrics.predictions)
        is_skipped = metrics.consecutive_skips > 0
        run.totals.add(metrics.loss, metrics.predictions, skipped=is_skipped)
        check_skips(step, metrics.consecutive_skips, train)
        left = (run.total_steps - step) * timer.seconds_per_step
        self._display.update(step, metrics.loss, timer.tokens_per_second, left)
        if train.log_every and (step % train.log_every == 0 or step == run.total_steps):
            self._write(
                step,
                "train",
                loss=run.totals.pop_mean_loss(),
                gradient_norm=metrics.gradient_norm,
                # A skipped update does not advance the counter of the schedule.
                learning_rate=float(self._learning_rate(step - 1 - metrics.skipped_updates)),
                tokens=run.totals.tokens,
                seconds=timer.total_seconds,
                tokens_per_second=timer.tokens_per_second,
                skipped_updates=metrics.skipped_updates,
            )
        if is_skipped:
            self._display.print_line(f"step {step}: loss or gradient not finite, update skipped")

    def evaluate(self) -> None:
        """Evaluate ``eval_tokens`` tokens, report them and decide on early stopping."""
        run, result = self._run, self._measure("validation", self._run.config.train.eval_tokens)
        if result is not None:
            is_scheduled = run.step % run.config.train.eval_every == 0
            run.history.add(run.step, result, is_scheduled=is_scheduled)
            run.stopped_early = run.has_stopped_improving()
            scores = f"{result}, {result.predictions:,} predictions"
            self._display.print_line(f"step {run.step}: validation {scores}")

    def evaluate_all(self) -> Evaluation | None:
        """Evaluate ``held_out_tokens`` tokens at the end; None if nothing is held out."""
        return self._measure("held_out", self._run.config.train.held_out_tokens)

    def _measure(self, kind: str, limit_tokens: int) -> Evaluation | None:
        """Evaluate the current state, unless that was done on the same tokens, and write a row."""
        run, split = self._run, self._run.corpus.validation
        if split is None:
            return None
        key = run.step, min(limit_tokens or split.num_predictions, split.num_predictions)
        if self._evaluated[0] != key:
            initial = run.state.tuned.get("initial")
            result = self._evaluator(run.state.params, split, limit_tokens, initial=initial)
            self._evaluated = key, result
        result = self._evaluated[1]
        self._write(
            run.step,
            kind,
            loss=result.nats_per_token,
            bits_per_byte=result.bits_per_byte,
            predictions=result.predictions,
            tokens=run.totals.tokens,
            seconds=self._timer.total_seconds,
        )
        return result

    def sample(self) -> None:
        """Continue the prompt, or answer it in a chat, with the current model, on the coordinator.

        Without a sample, if the tokenizer cannot encode the prompt, training goes on.
        """
        run = self._run
        gathered = gather(run, run.state)
        if gathered is not None and is_coordinator():
            prompt, text = sample(run, gathered, run.config.train.seed)
            self._write(run.step, "sample", text=prompt + text)
            self._display.print_line(f"step {run.step}: sample: {prompt}{text}")
        barrier("sample")

    def _print_header(self) -> None:
        """Print model, devices, data and first step."""
        run, config, corpus = self._run, self._run.config, self._run.corpus
        on_devices = f"{config.model.precision}, on {describe(run.mesh)}"
        lines = [f"{self._model}, {on_devices}; {corpus.summary}"]
        if warning := corpus.warning(config.data.validation_fraction):
            lines.append(f"warning: {warning}")
        if run.first_step:
            lines.append(f"resuming {run.workdir} at step {run.first_step} of {run.total_steps}")
        elif config.train.init_from:
            lines.append(f"parameters from {config.train.init_from}")
        if config.train.tune != "full":
            trained = trained_part(run.state.params, run.state.tuned)
            size = counted(sum(leaf.size for leaf in jax.tree.leaves(trained)), "parameter")
            lines.append(f"tuning {config.train.tune}: {size}")
        lines += run.changes
        if run.first_step >= run.total_steps:
            lines.append(
                "all steps are done; raise --config.train.steps or epochs for more (--minutes is "
                "only for a new --workdir)"
            )
        elif run.stopped_early:
            lines.append(run.history.reason())
        for line in lines:
            self._display.print_line(line)

    def summary(self, evaluation: Evaluation | None) -> dict[str, str]:
        """Return the lines of the summary of a run that has ended, and write its report.

        `evaluation` is the one at the end, of held-out text.
        """
        run, timer = self._run, self._timer
        lines = {
            "steps": f"{run.step:,}",
            "training time": format_duration(timer.total_seconds),
            "skipped updates": f"{int(run.state.skipped_updates)}",
        }
        if run.step > run.first_step:
            lines["training time"] += f", of which {timer.first:.1f} s for the first step"
            lines["speed"] = f"{timer.tokens_per_second:,.0f} tokens/s"
        if evaluation is not None:
            split = run.corpus.validation
            is_all = split is not None and evaluation.predictions == split.num_predictions
            scores = f"{evaluation}, {evaluation.predictions:,} predictions"
            lines["all held-out text" if is_all else "part of the held-out text"] = scores
            uniform = math.log(run.corpus.tokenizer.vocab_size)
            if evaluation.nats_per_token >= 0.98 * uniform:
                lines["warning"] = (
                    f"not clearly better than uniform guessing ({uniform:.4f} nats/token); train "
                    "for more steps, or with another config.optimizer.learning_rate"
                )
        lines |= run.history.summary(stopped_early=run.stopped_early)
        script, prompt = ("chat", "") if run.config.data.template else ("sample", " --prompt TEXT")
        if run.config.data.fim_rate:
            script, prompt = "complete", " FILE:LINE:COLUMN"
        use = f"{script}.py --workdir {shlex.quote(run.workdir)}{prompt}"
        gathered = gather(run, run.state)
        if is_coordinator():
            if run.config.train.tune != "full":
                path = save_tuned(run.workdir, run.corpus.tokenizer)
                lines["tuned"] = f"{path}, {os.path.getsize(path):,} bytes"
                if run.config.train.tune == "state":
                    use += "  # then: /load" if script == "chat" else " --load_state"
                    use += f" {shlex.quote(path)}"
            facts = {"model": self._model} | lines
            curve = plot_loss(run.workdir, self._model)
            lines["report"] = write_report(run, gathered, evaluation, facts, curve, use)
        return lines | {"sample with": name_commands(f"python scripts/{use}")}

    def _write(self, step: int, kind: str, **values: Any) -> None:
        if self._metrics is not None:
            self._metrics.write(step, kind, **values)


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
    if threading.current_thread() is not threading.main_thread():  # which gets the signals
        yield lambda step: None
        return
    received: list[str] = []
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not set by Python

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
    if consecutive >= config.max_skipped_updates:
        raise UserError(
            f"the loss or its gradient was not finite in {counted(consecutive, 'consecutive step')}"
            f", up to step {step} (batch {step - 1}, seed {config.seed}); parameters were last "
            f"updated at step {step - consecutive}: lower config.optimizer.learning_rate"
        )
