"""What a run prints and logs: steps and their speed, evaluations, samples and a summary.

On a terminal a bar shows the progress; elsewhere, plain lines do.
"""

import contextlib
import io
import math
import statistics
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax

from simplernn_jax.errors import counted
from simplernn_jax.parallel.distributed import is_coordinator
from simplernn_jax.parallel.mesh import describe
from simplernn_jax.parallel.pipeline import describe_stages
from simplernn_jax.project import name_commands
from simplernn_jax.training.evaluate import Evaluation
from simplernn_jax.training.loss_curve import plot_loss
from simplernn_jax.training.metrics import MetricsWriter
from simplernn_jax.training.optimizer import learning_rate_schedule
from simplernn_jax.training.run import Run

if TYPE_CHECKING:
    from rich.progress import Progress

SECONDS_BETWEEN_LINES = 5.0


class Display:
    """Lines and progress of a run on the standard output of the coordinator.

    `progress` is a bar, which replaces the line of progress every 5 seconds.
    """

    def __init__(self, total_steps: int, progress: "Progress | None" = None) -> None:
        self._total = total_steps
        self._progress = progress
        self._last_line = -SECONDS_BETWEEN_LINES
        self._losses: list[float] = []
        """Losses of the steps since the last line, which shows their mean."""

    def update(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """Show progress; 0 tokens per second if the speed is not known yet."""
        speed = ""
        if tokens_per_second:
            speed = f"  {tokens_per_second:,.0f} tokens/s  {format_duration(seconds_left)} left"
        if self._progress is not None:
            (task,) = self._progress.task_ids
            self._progress.update(task, completed=step, status=f"loss {loss:.4f}{speed}")
            return
        self._losses.append(loss)
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES:
            mean = statistics.fmean(self._losses)
            self.print_line(f"step {step}/{self._total}  loss {mean:.4f}{speed}")
            self._last_line, self._losses = now, []

    def print_line(self, text: str) -> None:
        """Print a line above the bar."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        elif is_coordinator():
            print(text, flush=True)


@contextlib.contextmanager
def open_display(first_step: int, total_steps: int) -> Iterator[Display]:
    """Open the display, with a bar if stdout is a terminal that can draw it."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Samples may hold characters that the terminal cannot show.
        sys.stdout.reconfigure(errors="replace")
    if not is_coordinator() or not sys.stdout.isatty():
        yield Display(total_steps)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console()
    if console.is_dumb_terminal:
        yield Display(total_steps)
        return
    columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[status]}"))
    with Progress(TextColumn("step"), *columns, console=console) as progress:
        progress.add_task("", total=total_steps, completed=first_step, status="")
        yield Display(total_steps, progress)


def format_duration(seconds: float) -> str:
    """Return ``1:05`` or ``2:03:04``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class StepTimer:
    """Training time without evaluations, samples and saves; speed without the first step."""

    def __init__(self, seconds_before: float = 0.0) -> None:
        """Start at 0; `seconds_before` is the training time before the run was resumed."""
        self.seconds = 0.0
        self.first = 0.0
        """Seconds of the first step, compilation included."""
        self._before = seconds_before
        self._steps = 0
        self._tokens = 0
        self._since = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of the ``with`` block."""
        before = time.monotonic()
        yield
        self._since += time.monotonic() - before

    def start(self) -> None:
        """Count the time from now on."""
        self._since = time.monotonic()

    def tick(self, tokens: int) -> None:
        """Count a finished step."""
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now
        self._steps += 1
        if self._steps == 1:
            self.first = self.seconds
        else:
            self._tokens += tokens

    @property
    def total_seconds(self) -> float:
        """Training time of the whole run, to the millisecond."""
        return round(self._before + self.seconds, 3)

    @property
    def seconds_per_step(self) -> float:
        """Mean seconds per step, excluding the first step."""
        return (self.seconds - self.first) / max(self._steps - 1, 1)

    @property
    def tokens_per_second(self) -> float:
        """Target tokens per second, mean over all steps but the first."""
        seconds = self.seconds - self.first
        return self._tokens / seconds if seconds > 0 else 0.0


class Reporter:
    """Prints lines and writes metrics about a run.

    `metrics` is None in processes that are not the coordinator.
    """

    def __init__(
        self, run: Run, metrics: MetricsWriter | None, display: Display, train_step: Any
    ) -> None:
        self.print_line = display.print_line
        self.timer = StepTimer(0.0 if metrics is None else metrics.seconds)
        self._run = run
        self._metrics = metrics
        self._display = display
        self._train_step = train_step
        config = run.config
        self._learning_rate = learning_rate_schedule(config.optimizer, run.total_steps)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(run.state.params))
        size = counted(parameters, "parameter")
        kind = config.model.block + " " + config.model.mixer.replace("simple_rnn", "SimpleRNN")
        self._model = f"{kind} model, {size}"
        self._last_loss = 0.0

    @property
    def recompilations(self) -> int:
        """Compilations of the train step after the first: shapes and dtypes should be constant."""
        return max(self._train_step._cache_size() - 1, 0)

    def print_header(self) -> None:
        """Print model, devices, data and first step."""
        run, config, corpus = self._run, self._run.config, self._run.corpus
        self.print_line(
            f"{self._model}, {config.model.precision}, on {describe(run.mesh)}; {corpus.summary}"
        )
        if warning := corpus.warning(config.data.validation_fraction):
            self.print_line(f"warning: {warning}")
        if config.mesh.pipeline > 1:
            length = config.train.bptt_window or config.data.sequence_length
            self.print_line(describe_stages(length, config.mesh.pipeline))
        if run.first_step:
            self.print_line(f"resuming {run.workdir} at step {run.first_step} of {run.total_steps}")
        elif config.train.init_from:
            self.print_line(f"parameters from {config.train.init_from}")
        for change in run.changes:
            self.print_line(change)
        if run.first_step >= run.total_steps:
            self.print_line("all steps are done; raise --config.train.steps or epochs for more")
        elif run.stopped_early:
            self.print_line(run.history.reason())

    def step(self, step: int, metrics: Any) -> None:
        """Report a step; `metrics` are `StepMetrics` of Python numbers."""
        timer, totals, total_steps = self.timer, self._run.totals, self._run.total_steps
        left = (total_steps - step) * timer.seconds_per_step
        self._display.update(step, metrics.loss, timer.tokens_per_second, left)
        self._last_loss = metrics.loss
        every = self._run.config.train.log_every
        if every and (step % every == 0 or step == total_steps):
            self._write(
                step,
                "train",
                loss=totals.pop_mean_loss(),
                gradient_norm=metrics.gradient_norm,
                # A skipped update does not advance the counter of the schedule.
                learning_rate=float(self._learning_rate(step - 1 - metrics.skipped_updates)),
                tokens=totals.tokens,
                seconds=timer.total_seconds,
                tokens_per_second=timer.tokens_per_second,
                skipped_updates=metrics.skipped_updates,
                recompilations=self.recompilations,
            )
        if metrics.consecutive_skips:
            self.print_line(f"step {step}: loss or gradient not finite, update skipped")

    def evaluation(self, kind: str, result: Evaluation) -> None:
        """Report an evaluation of the current state: ``validation``, or ``held_out`` at the end."""
        step = self._run.step
        self._write(
            step,
            kind,
            loss=result.nats_per_token,
            bits_per_byte=result.bits_per_byte,
            predictions=result.predictions,
            tokens=self._run.totals.tokens,
            seconds=self.timer.total_seconds,
        )
        if kind == "validation":  # `summarize` prints the other
            self.print_line(f"step {step}: validation {result}, {result.predictions:,} predictions")

    def sample(self, text: str) -> None:
        """Report a sample from the current state."""
        self._write(self._run.step, "sample", text=text)
        self.print_line(f"step {self._run.step}: sample: {text}")

    def summarize(self, evaluation: Evaluation | None) -> None:
        """Print the summary of a run that has ended, and draw its loss curve.

        `evaluation` has the scores of the whole validation split.
        """
        run, timer, workdir = self._run, self.timer, self._run.workdir
        speed, duration = timer.tokens_per_second, format_duration(timer.total_seconds)
        lines = {"steps": f"{run.step:,}", "training time": duration}
        if run.step > run.first_step:
            lines["training time"] += (
                f", of which {timer.first:.1f} s for the first step (compilation)"
            )
            lines["speed"] = f"{speed:,.0f} tokens/s" if speed else "n/a (one step)"
        lines |= {
            "skipped updates": f"{int(run.state.skipped_updates)}",
            "recompilations": f"{self.recompilations}",
        }
        if evaluation is not None:
            lines["all held-out text"] = f"{evaluation}, {evaluation.predictions:,} predictions"
        loss = self._last_loss if evaluation is None else evaluation.nats_per_token
        uniform = math.log(run.corpus.tokenizer.vocab_size)
        if loss >= 0.98 * uniform:
            lines["warning"] = (
                f"{loss:.4f} nats/token is not clearly better than uniform guessing "
                f"({uniform:.4f}); train for more steps, or with another "
                f"--config.optimizer.learning_rate than {run.config.optimizer.learning_rate:g}"
            )
        lines |= run.history.summary(stopped_early=run.stopped_early)
        if is_coordinator():
            lines["loss curve"] = plot_loss(workdir, self._model)
        script, prompt = ("chat", "") if run.config.data.template else ("sample", " --prompt TEXT")
        command = name_commands(f"python scripts/{script}.py")
        lines["sample with"] = f"{command} --workdir {workdir}{prompt}"
        self.print_line("done\n" + align(lines))

    def _write(self, step: int, kind: str, **values: Any) -> None:
        if self._metrics is not None:
            self._metrics.write(step, kind, **values)


def align(values: dict[str, str]) -> str:
    """Return aligned lines ``name  value``."""
    width = max(map(len, values))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in values.items())
