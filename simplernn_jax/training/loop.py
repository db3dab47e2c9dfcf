"""A run from its configuration to its last checkpoint.

The order of a step is load-bearing: dispatch step t, take the next batch, read the metrics of
step t - 1 while the device works; then, where one is due, evaluate, sample and save, all on
the state after step t. What is saved is exactly what the next step starts from.
"""

import dataclasses
import os
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from simplernn_jax import config as config_lib
from simplernn_jax.checkpoint.checkpointer import Checkpointer
from simplernn_jax.checkpoint.file_layout import FileLayout
from simplernn_jax.checkpoint.folder import check_workdir
from simplernn_jax.config import Config
from simplernn_jax.data.batches import Batch, make_batches
from simplernn_jax.errors import UserError
from simplernn_jax.files import write_file
from simplernn_jax.sharding.agreement import (
    PreemptionSync,
    barrier,
    broadcast_from_coordinator,
    is_coordinator,
)
from simplernn_jax.sharding.global_arrays import from_rows, local_copy, rows_of_this_process
from simplernn_jax.sharding.mesh import BATCH_AXES, check_fits, describe, make_mesh
from simplernn_jax.sharding.pipeline import describe_stages
from simplernn_jax.training import report
from simplernn_jax.training.clock import Clock
from simplernn_jax.training.display import Display, open_display
from simplernn_jax.training.early_stopping import Evaluations
from simplernn_jax.training.evaluate import Evaluation, Evaluator
from simplernn_jax.training.interruption import Interruption
from simplernn_jax.training.memory_check import check_train_step
from simplernn_jax.training.metrics import MetricsWriter, NoMetrics
from simplernn_jax.training.optimizer import learning_rate_schedule, make_optimizer
from simplernn_jax.training.placement import batch_shardings
from simplernn_jax.training.preparation import changed_fields, prepare, total_steps
from simplernn_jax.training.profiling import Profile
from simplernn_jax.training.progress import Progress, check_finite
from simplernn_jax.training.recompilation import CountedCalls
from simplernn_jax.training.sample import sample_text
from simplernn_jax.training.train_step import (
    StepMetrics,
    TrainState,
    init_train_state,
    make_train_step,
    state_shardings,
)


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended."""

    step: int
    interrupted_by: str | None
    """Name of the signal that stopped it, or None if it ran to its end."""
    evaluation: Evaluation | None
    """Of the whole validation split; None if interrupted or if nothing is held out."""


def train(config: Config, workdir: str) -> Result:
    """Trains, or goes on training, in `workdir`.

    If `workdir` holds a checkpoint, the run goes on from it and ends byte for byte as if it had
    never stopped. SIGTERM and SIGINT save at the current step and return. It ends early where
    the validation loss no longer gets better and ``train.stop_after_worse`` says so.

    Several processes (`distributed`) call this together; a signal to any stops them all in
    the same step. Process 0 alone prints, writes samples and metrics.

    Raises:
      UserError: the data is unusable; the mesh does not fit; the checkpoint is of another model or
        other data; the loss was not finite too often in a row; the disk is full.
    """
    config_lib.validate(config)
    check_workdir(workdir)
    workdir = os.path.abspath(workdir)
    os.makedirs(workdir, exist_ok=True)
    run = _Run(config, workdir)
    try:
        with Interruption() as interruption:
            result = run.to_the_end(PreemptionSync(lambda: interruption.requested))
    except BaseException:
        run.close(failed=True)
        raise
    run.close()
    return result


class _Run:
    """The parts of a run that live as long as it does."""

    def __init__(self, config: Config, workdir: str):
        self.mesh = make_mesh(config.mesh)
        self.config, self.corpus = prepare(config, workdir)
        check_fits(self.config, self.mesh)
        self.workdir = workdir
        self.total_steps = total_steps(self.config, self.corpus)
        optimizer = make_optimizer(self.config.optimizer, self.total_steps, self.mesh)
        check_train_step(self.config, optimizer, self.mesh)
        self.layout = FileLayout(self.config, optimizer, self.mesh)
        self.checkpointer = Checkpointer(
            workdir,
            self.config,
            self.corpus.tokenizer.to_json(),
            keep_last=config.train.keep_last,
            keep_best=config.train.keep_best,
        )
        self.changes: list[str] = []
        try:
            self.progress, self.evaluations = Progress(), Evaluations()
            self.state, self.batches = self._start_or_resume(optimizer)
            self.position = self.batches.get_state()
            self.step = self.first_step = int(self.state.step)
            self.stopped_early = self._is_worse_for_long()
            self.metrics = MetricsWriter(workdir, self.step) if is_coordinator() else NoMetrics()
        except BaseException:
            self.checkpointer.close()
            raise
        step = make_train_step(self.config, optimizer, self.mesh)
        self.train_step = CountedCalls("the train step", step)
        self.learning_rate = learning_rate_schedule(self.config.optimizer, self.total_steps)
        self.evaluator = Evaluator(self.config, self.corpus.tokenizer.pad_id, self.mesh)
        self.description = report.describe_model(self.config.model, self.state.params)
        self.clock = Clock(self.metrics.seconds)
        self.measured: tuple[int, Evaluation] | None = None

    def _start_or_resume(self, optimizer: Any) -> tuple[TrainState, Any]:
        config, corpus = self.config, self.corpus
        by_rows = NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))
        self.rows = rows_of_this_process(by_rows, config.data.batch_size)
        batches = make_batches(
            corpus.train, config.data, config.train.seed, corpus.tokenizer.pad_id, self.rows
        )
        shardings = state_shardings(config, optimizer, self.mesh)
        init = jax.jit(lambda: init_train_state(config, optimizer), out_shardings=shardings)
        restored = self.checkpointer.restore(self.layout.abstract, self.layout.shardings)
        if restored is None:
            return init(), batches
        if restored.data_state["content_hash"] != corpus.content_hash:
            raise UserError(
                f"the text of {config.data.source!r} or its tokenizer is not what the run in "
                f"{self.workdir} was trained on; give it the same text, or use another --workdir"
            )
        batches.set_state(restored.data_state["batches"])
        self.progress = Progress.from_json(restored.data_state.get("progress"))
        self.evaluations = Evaluations.from_json(restored.data_state.get("evaluations"))
        self.changes = changed_fields(config, restored.config)
        return self.layout.from_files(restored.state), batches

    def _next_batch(self) -> Batch:
        batch, shardings = next(self.batches), batch_shardings(self.mesh)
        if shardings is None:
            return jax.device_put(batch)
        return from_rows(batch, shardings, self.rows.start, self.config.data.batch_size)

    def close(self, *, failed: bool = False) -> None:
        """Waits for the last save and closes the files."""
        try:
            self.metrics.close()
        finally:
            self.checkpointer.close(failed=failed)

    def to_the_end(self, vote: PreemptionSync) -> Result:
        """Takes all steps that are left, unless a signal comes."""
        if is_coordinator():
            self._write_config()
        with open_display(self.step, self.total_steps) as display:
            self._announce(display)
            steps = self.config.train.profile_steps if is_coordinator() else 0
            profile = Profile(self.workdir, steps, display.say)
            with self.train_step, profile:
                self._take_steps(vote, display, profile)
                signal = vote.signal(self.step)
                if signal:  # before the profile is written: a preempted job has little time left
                    self._save(wait=True)
            if signal:
                display.say(
                    f"{signal}: saved at step {self.step} of {self.total_steps}; "
                    "run the same command to resume"
                )
                return Result(self.step, signal, None)
            return self._finish(display)

    def _take_steps(self, vote: PreemptionSync, display: Display, profile: Profile) -> None:
        if self._has_ended():
            return
        batch = self._next_batch()
        pending: StepMetrics | None = None
        self.clock.start()
        while not self._has_ended() and not vote.signal(self.step):
            position = self.batches.get_state()
            if profile.is_due():
                jax.block_until_ready(self.state)  # so that whole steps are recorded
                with self.clock.paused():
                    profile.start_or_stop()
            with profile.step(self.step + 1):
                self.state, metrics = self.train_step(self.state, batch)
            self.step += 1
            if self.step < self.total_steps:
                batch = self._next_batch()
            if pending is not None:
                self._read(self.step - 1, pending, display)
            pending = metrics
            self.position = position
            if self._something_due():
                self._read(self.step, metrics, display)
                pending = None
                with self.clock.paused():
                    self._do_what_is_due(display)
        if pending is not None:
            self._read(self.step, pending, display)
        self.clock.stop()

    def _read(self, step: int, metrics: StepMetrics, display: Display) -> None:
        """Waits for the step and looks at its numbers."""
        loss, norm, predictions, skipped, in_a_row = (x.item() for x in jax.device_get(metrics))
        self.clock.tick(predictions)
        self.progress.add(loss, predictions, skipped=in_a_row > 0)
        check_finite(step, in_a_row, self.config.train)
        left = (self.total_steps - step) * self.clock.seconds_per_step
        display.update(step, loss, self.clock.tokens_per_second, left)
        every = self.config.train.log_every
        if every and (step % every == 0 or step == self.total_steps):
            # The counter of the schedule stands still when an update is skipped.
            rate = float(self.learning_rate(step - 1 - skipped))
            self.metrics.write(
                step,
                "train",
                loss=self.progress.take_mean_loss(),
                gradient_norm=norm,
                learning_rate=rate,
                tokens=self.progress.tokens,
                seconds=self.clock.total_seconds,
                tokens_per_second=self.clock.tokens_per_second,
                skipped_updates=skipped,
                recompilations=self.train_step.recompilations,
            )
        if in_a_row:
            display.say(f"step {step}: loss or gradient not finite, update skipped")

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0 and self.step < self.total_steps

    def _has_ended(self) -> bool:
        return self.step >= self.total_steps or self.stopped_early

    def _is_worse_for_long(self) -> bool:
        limit = self.config.train.stop_after_worse
        return limit > 0 and bool(broadcast_from_coordinator(self.evaluations.has_ended(limit)))

    def _something_due(self) -> bool:
        train = self.config.train
        return any(map(self._due, (train.eval_every, train.sample_every, train.save_every)))

    def _do_what_is_due(self, display: Display) -> None:
        train = self.config.train
        if self._due(train.eval_every):
            result = self._evaluate(train.eval_tokens, display)
            if result is not None:
                self.evaluations.add(self.step, result)
                self.stopped_early = self._is_worse_for_long()
        if self._due(train.sample_every):
            self._sample(display)
        if self._due(train.save_every):
            self._save()

    def _measure(self, limit_tokens: int) -> Evaluation | None:
        """Evaluates the current state, unless that was done on the same tokens."""
        split = self.corpus.validation
        if split is None:
            return None
        predictions = min(limit_tokens or split.num_predictions, split.num_predictions)
        if self.measured is not None:
            step, result = self.measured
            if (step, result.predictions) == (self.step, predictions):
                return result
        result = self.evaluator(self.state.params, split, limit_tokens)
        self.measured = self.step, result
        return result

    def _evaluate(self, limit_tokens: int, display: Display) -> Evaluation | None:
        result = self._measure(limit_tokens)
        reported = self.evaluations.last_step, self.evaluations.predictions
        if result is None or reported == (self.step, result.predictions):
            return result
        self.metrics.write(
            self.step,
            "validation",
            loss=result.nats_per_token,
            bits_per_byte=result.bits_per_byte,
            predictions=result.predictions,
            tokens=self.progress.tokens,
            seconds=self.clock.total_seconds,
        )
        display.say(f"step {self.step}: validation {result}")
        return result

    def _sample(self, display: Display) -> None:
        params = local_copy(self.state.params)
        if is_coordinator():
            text = sample_text(self.config, params, self.corpus.tokenizer)
            self.metrics.write(self.step, "sample", text=text)
            display.say(f"step {self.step}: sample: {text}")
        barrier("a sample is written")

    def _save(self, *, wait: bool = False) -> None:
        data_state = {
            "batches": self.position,
            "content_hash": self.corpus.content_hash,
            "progress": self.progress.to_json(),
            "evaluations": self.evaluations.to_json(),
        }
        metrics = None
        if self.measured is not None and self.measured[0] == self.step:
            result = self.measured[1]
            metrics = {"validation_loss": result.nats_per_token, "predictions": result.predictions}
        state = self.layout.to_files(self.state)
        self.checkpointer.save(self.step, state, data_state, metrics, wait=wait)

    def _write_config(self) -> None:
        path = os.path.join(self.workdir, "config.json")
        try:
            write_file(path, config_lib.to_json(self.config).encode())
        except OSError as error:
            raise UserError(
                f"{path}: {error.strerror}; remove it, or choose another --workdir"
            ) from error

    def _announce(self, display: Display) -> None:
        display.say(
            f"{self.description}, {self.config.model.precision}, on {describe(self.mesh)}; "
            f"{self.corpus.summary}"
        )
        if self.corpus.warning:
            display.say(f"warning: {self.corpus.warning}")
        if self.config.mesh.stage > 1:
            length = self.config.train.backward_window or self.config.data.sequence_length
            display.say(describe_stages(length, self.config.mesh.stage))
        if self.first_step:
            display.say(f"resuming {self.workdir} at step {self.first_step} of {self.total_steps}")
        for change in self.changes:
            display.say(change)
        if self.first_step >= self.total_steps:
            display.say("all steps are done; raise --config.train.steps or epochs to train more")
        elif self.stopped_early:
            display.say(self.evaluations.why_ended())

    def _finish(self, display: Display) -> Result:
        train = self.config.train
        if self.step > self.first_step:
            if 0 < train.eval_every < self.total_steps:
                self._measure(train.eval_tokens)  # as the checkpoints that it is to compare with
            # Before the whole evaluation, which may take longer than a preempted job has left.
            self._save(wait=True)
        last = None if self.measured is None else self.measured[1]
        evaluation = self._evaluate(0, display)
        facts = report.facts_of(self.state, self.clock, self.train_step, evaluation)
        facts |= self.evaluations.facts(
            self.step, last or evaluation, self.workdir, stopped_early=self.stopped_early
        )
        if is_coordinator():
            facts["loss curve"] = report.plot_loss(self.workdir, self.description)
        facts["sample from it"] = f"python scripts/sample.py --workdir {self.workdir} --prompt TEXT"
        display.say("done\n" + report.summary(facts))
        return Result(self.step, None, evaluation)
