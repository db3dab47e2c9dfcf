"""Terminal output and metrics of a run: steps, evaluations, samples and a summary."""

import math
from typing import Any

import jax

from simplernn_jax.errors import counted
from simplernn_jax.ops.native import has_fast_bfloat16
from simplernn_jax.parallel.distributed import is_coordinator
from simplernn_jax.parallel.mesh import describe
from simplernn_jax.parallel.pipeline import describe_stages
from simplernn_jax.project import name_commands
from simplernn_jax.training.accumulation import choose_microbatches
from simplernn_jax.training.display import Display, format_duration
from simplernn_jax.training.evaluate import Evaluation
from simplernn_jax.training.loss_curve import plot_loss
from simplernn_jax.training.metrics import MetricsWriter
from simplernn_jax.training.optimizer import learning_rate_schedule
from simplernn_jax.training.run import Run
from simplernn_jax.training.step_statistics import RecompilationCounter, StepTimer


class Reporter:
    """Prints lines and writes metrics about a run.

    `metrics` is None in processes that are not the coordinator.
    """

    def __init__(
        self,
        run: Run,
        metrics: MetricsWriter | None,
        display: Display,
        train_step: RecompilationCounter,
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
        microbatches = choose_microbatches(config, run.mesh).train.gradient_accumulation or 1
        if microbatches > 1:
            sequences, length = config.data.batch_size // microbatches, config.data.sequence_length
            self.print_line(f"{microbatches} microbatches of {sequences} x {length} tokens")
        if run.first_step:
            self.print_line(f"resuming {run.workdir} at step {run.first_step} of {run.total_steps}")
        elif _is_slow_bfloat16(run):
            self.print_line(
                "matmuls of bfloat16 are computed in float32 on this processor: "
                "--config.model.precision=float32 saves the conversions"
            )
        if config.train.init_from and not run.first_step:
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
                recompilations=self._train_step.recompilations,
            )
        if metrics.consecutive_skips:
            self.print_line(f"step {step}: loss or gradient not finite, update skipped")

    def validation(self, result: Evaluation) -> None:
        """Report an evaluation of the current state on ``eval_tokens`` tokens."""
        self._write_evaluation("validation", result)
        step = self._run.step
        self.print_line(f"step {step}: validation {result}, {result.predictions:,} predictions")

    def held_out(self, result: Evaluation) -> None:
        """Write the evaluation of the whole validation split; `summarize` prints it."""
        self._write_evaluation("held_out", result)

    def _write_evaluation(self, kind: str, result: Evaluation) -> None:
        self._write(
            self._run.step,
            kind,
            loss=result.nats_per_token,
            bits_per_byte=result.bits_per_byte,
            predictions=result.predictions,
            tokens=self._run.totals.tokens,
            seconds=self.timer.total_seconds,
        )

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
            "recompilations": f"{self._train_step.recompilations}",
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
        lines |= run.history.summary(workdir, stopped_early=run.stopped_early)
        if is_coordinator() and (path := plot_loss(workdir, self._model)):
            lines["loss curve"] = path
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


def _is_slow_bfloat16(run: Run) -> bool:
    """Return whether a run uses bfloat16 on a CPU that multiplies it no faster than float32."""
    is_on_cpu = run.mesh.devices.flat[0].platform == "cpu"
    return is_on_cpu and run.config.model.precision == "bfloat16" and not has_fast_bfloat16()
