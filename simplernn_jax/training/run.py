"""A training run: its data, its state, its progress and its checkpoints."""

import copy
import dataclasses
import math
import os
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from simplernn_jax import config as config_lib
from simplernn_jax.checkpoint.checkpointer import Checkpointer
from simplernn_jax.checkpoint.contents import Quality
from simplernn_jax.checkpoint.folder import check_workdir
from simplernn_jax.config import Config
from simplernn_jax.data.batches import Batch, make_batches
from simplernn_jax.errors import UserError, counted
from simplernn_jax.models.language_model import check_mesh
from simplernn_jax.parallel.distributed import (
    barrier,
    broadcast_from_coordinator,
    check_same,
    is_coordinator,
)
from simplernn_jax.parallel.mesh import (
    BATCH_AXES,
    check_fits,
    global_arrays_from_local,
    make_mesh,
    named_shardings,
    process_slice,
    shard_further,
)
from simplernn_jax.parallel.named_leaves import in_layout_of
from simplernn_jax.training.evaluate import Evaluation
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.preparation import (
    changed_fields,
    initial_parameters,
    prepare,
    total_steps,
)
from simplernn_jax.training.train_step import (
    TrainState,
    batch_shardings,
    check_memory,
    init_train_state,
    state_shardings,
    state_specs,
)

_SHARED_SECONDS = 10.0
"""Time that a network file system may take to show a new file."""

_OVERFITTING_MARGIN = 0.01
"""Relative increase over the best loss that triggers the overfitting hint."""


@dataclasses.dataclass
class LossTotals:
    """Tokens and loss, summed over steps and saved with every checkpoint.

    Metrics after a resume therefore equal the metrics of an uninterrupted run.
    """

    tokens: int = 0
    """Predictions since step 0."""
    loss_sum: float = 0.0
    """Nats of all predictions since `pop_mean_loss`, excluding skipped updates."""
    loss_tokens: int = 0
    """Number of these predictions."""

    def add(self, loss: float, predictions: int, *, skipped: bool) -> None:
        """Add a step of `loss` nats per prediction; a `skipped` update counts its tokens only."""
        self.tokens += predictions
        if not skipped:
            self.loss_sum += loss * predictions
            self.loss_tokens += predictions

    def pop_mean_loss(self) -> float:
        """Return nats per prediction since the last call; NaN if all updates were skipped."""
        mean = self.loss_sum / self.loss_tokens if self.loss_tokens else math.nan
        self.loss_sum, self.loss_tokens = 0.0, 0
        return mean


@dataclasses.dataclass
class ValidationHistory:
    """The best and the last evaluation of a run, at its end included.

    Saved with every checkpoint, so that a resumed run stops at the same step as an uninterrupted
    run. All scored the same tokens: a change of ``eval_tokens`` starts a new history.
    """

    predictions: int = 0
    """Number of predictions that each evaluation scored."""
    best_step: int | None = None
    best_loss: float | None = None
    """Nats per token."""
    last_step: int | None = None
    last_loss: float | None = None
    """Nats per token; None if it was not finite."""
    since_best: int = 0
    """Number of scheduled evaluations since the best one."""

    def add(self, step: int, evaluation: Evaluation, *, is_scheduled: bool) -> None:
        """Record an evaluation; an unscheduled one may be the best, but never stops a run early."""
        if evaluation.predictions != self.predictions:
            vars(self).update(vars(ValidationHistory(evaluation.predictions)))
        loss = evaluation.nats_per_token
        self.last_step, self.last_loss = step, loss if math.isfinite(loss) else None
        self.since_best += is_scheduled
        best = math.inf if self.best_loss is None else self.best_loss
        if loss < best:
            self.since_best = 0
        if math.isfinite(loss) and loss <= best:  # of equal ones the newest, as of checkpoints
            self.best_step, self.best_loss = step, loss

    def should_stop(self, patience: int) -> bool:
        """Return whether `patience` scheduled evaluations found no new best; 0 disables it."""
        return 0 < patience <= self.since_best

    def reason(self) -> str:
        """Return why the run stopped early, and how to train more."""
        times = counted(self.since_best, "evaluation")
        best = f", best at step {self.best_step}" if self.best_loss is not None else ""
        return (
            f"stopped early at step {self.last_step}: no better validation loss in {times}{best}; "
            "raise --config.train.early_stopping_patience, or set it to 0, to train more"
        )

    def summary(self, *, stopped_early: bool) -> dict[str, str]:
        """Return lines of the summary if the run ended early or was better before its end."""
        lines = {"early stopping": self.reason()} if stopped_early else {}
        if self.best_loss is None or self.best_step == self.last_step:
            return lines
        higher = math.inf if self.last_loss is None else self.last_loss - self.best_loss
        best = f"{self.best_loss:.4f} nats/token at step {self.best_step}"
        lines["best validation"] = f"{best}, {higher:.4f} lower than at step {self.last_step}"
        if higher >= _OVERFITTING_MARGIN * self.best_loss:
            lines["overfitting"] = (
                "train on more text, with --config.model.dropout, or for fewer steps; --checkpoint "
                "best loads the best model saved (make eval_every a multiple of save_every)"
            )
        return lines


class CheckpointLayout:
    """Conversion between stacked pipeline stages and the per-layer layout of checkpoints.

    Without stages the two states are the same, and nothing is converted. The arguments are those
    of the run.
    """

    def __init__(self, config: Config, optimizer: optax.GradientTransformation, mesh: Mesh):
        single = copy.deepcopy(config)
        single.mesh.pipeline = 1
        self.abstract: TrainState = jax.eval_shape(lambda: init_train_state(single, optimizer))
        """Names, shapes and dtypes of the state in checkpoints."""
        self.shardings = state_shardings(single, optimizer, mesh)
        """Shardings of its arrays; None on one device."""
        self.to_checkpoint = self.from_checkpoint = _identity
        if config.mesh.pipeline == 1:
            return
        # Sharded over the stages too: no stage needs memory for all layers.
        specs = shard_further(self.abstract, state_specs(single, optimizer, mesh), "pipeline", mesh)
        self.shardings = named_shardings(specs, mesh)
        trained = jax.eval_shape(lambda: init_train_state(config, optimizer))
        self.to_checkpoint = jax.jit(
            partial(in_layout_of, self.abstract), out_shardings=self.shardings
        )
        self.from_checkpoint = jax.jit(
            partial(in_layout_of, trained), out_shardings=state_shardings(config, optimizer, mesh)
        )


def _identity(state: TrainState) -> TrainState:
    return state


class Run:
    """A training run: data, mesh, optimizer, train state and checkpoints.

    It starts from step 0 or resumes from the newest valid checkpoint of its workdir; a workdir that
    is missing is created. Leaving its ``with`` block waits for the last save.

    Raises:
      UserError: the data is unusable; the model does not fit the mesh or its memory; the
        checkpoint has a different model or data; another process is using the workdir.
    """

    def __init__(self, config: Config, workdir: str) -> None:
        config_lib.validate(config)
        check_workdir(workdir)
        self.workdir = os.path.abspath(workdir)
        self.mesh = make_mesh(config.mesh)
        os.makedirs(self.workdir, exist_ok=True)
        _check_shared(self.workdir)
        self.config, self.corpus = prepare(config, self.workdir)
        check_fits(self.config, self.mesh)
        check_mesh(self.config.model, self.mesh)
        self.total_steps = total_steps(self.config, self.corpus)
        self.optimizer = make_optimizer(self.config.optimizer, self.total_steps, self.mesh)
        check_memory(self.config, self.optimizer, self.mesh)
        self._layout = CheckpointLayout(self.config, self.optimizer, self.mesh)
        self.totals, self.history = LossTotals(), ValidationHistory()
        self.changes: list[str] = []
        """Fields of the configuration that differ from the checkpoint's, one line each."""
        self.latest_evaluation: tuple[int, Evaluation] | None = None
        """The last evaluation in this process, and its step."""
        self._checkpointer = Checkpointer(
            self.workdir,
            self.config,
            self.corpus.tokenizer.to_json(),
            keep_last=config.train.keep_last,
            keep_best=config.train.keep_best,
        )
        try:
            self.state, self._batches = self._start_or_resume()
            self.position = self._batches.get_state()
            """Position in the data of the batch of step ``step + 1``."""
            self.step = self.first_step = int(self.state.step)
            self.stopped_early = self.has_stopped_improving()
        except BaseException:
            self._checkpointer.close()
            raise

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._checkpointer.close(failed=kind is not None)

    def _start_or_resume(self) -> tuple[TrainState, Any]:
        config, corpus = self.config, self.corpus
        sharding = NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))
        self._local_sequences = process_slice(sharding, config.data.batch_size)
        seed, pad_id = config.train.seed, corpus.tokenizer.pad_id
        batches = make_batches(corpus.train, config.data, seed, pad_id, self._local_sequences)
        restored = self._checkpointer.restore(self._layout.abstract, self._layout.shardings)
        if restored is None:
            shardings = state_shardings(config, self.optimizer, self.mesh)
            init = jax.jit(
                lambda: init_train_state(config, self.optimizer), out_shardings=shardings
            )
            state: TrainState = init()
            if config.train.init_from:
                state = self._with_initial_parameters(state)
            return state, batches
        saved = restored.data_state
        if saved["content_hash"] != corpus.content_hash:
            raise UserError(
                f"{self.workdir} was trained on different text or with another tokenizer than "
                f"{config.data.source!r}; use {restored.config.data.source!r}, or another --workdir"
            )
        batches.set_state(saved["batches"])
        self.totals = LossTotals(**saved["progress"])
        self.history = ValidationHistory(**saved["evaluations"])
        self.changes = changed_fields(config, restored.config)
        return self._layout.from_checkpoint(restored.state), batches

    def _with_initial_parameters(self, state: TrainState) -> TrainState:
        """Replace the parameters with those in ``init_from``."""
        abstract, shardings = self._layout.abstract, self._layout.shardings
        params = initial_parameters(
            self.config, abstract.params, None if shardings is None else shardings.params
        )
        saved = self._layout.to_checkpoint(state)
        return self._layout.from_checkpoint(dataclasses.replace(saved, params=params))

    @property
    def has_ended(self) -> bool:
        """Return whether no step remains."""
        return self.step >= self.total_steps or self.stopped_early

    def has_stopped_improving(self) -> bool:
        """Return whether to stop before the last step; all processes follow the coordinator."""
        patience = self.config.train.early_stopping_patience
        if not patience or self.step >= self.total_steps:
            return False
        return bool(broadcast_from_coordinator(self.history.should_stop(patience)))

    def next_batch(self) -> Batch | None:
        """Return the batch of step ``step + 1`` on the devices; None after the last step."""
        self.position = self._batches.get_state()
        if self.step >= self.total_steps:
            return None
        batch, shardings = next(self._batches), batch_shardings(self.mesh)
        if shardings is None:
            return jax.device_put(batch)
        start, batch_size = self._local_sequences.start, self.config.data.batch_size
        return global_arrays_from_local(batch, shardings, start, batch_size)

    def save(self, *, wait: bool = False) -> None:
        """Save a checkpoint as `Checkpointer.save` does, in the background unless `wait`."""
        data_state = {
            "batches": self.position,
            "content_hash": self.corpus.content_hash,
            "progress": dataclasses.asdict(self.totals),
            "evaluations": dataclasses.asdict(self.history),
        }
        quality = None
        if self.latest_evaluation is not None and self.latest_evaluation[0] == self.step:
            result = self.latest_evaluation[1]
            quality = Quality(result.nats_per_token, result.predictions)
        state = self._layout.to_checkpoint(self.state)
        self._checkpointer.save(self.step, state, data_state, quality, wait=wait)


def _check_shared(folder: str) -> None:
    """Raise `UserError` in all processes unless each sees what process 0 writes into `folder`."""
    if jax.process_count() == 1:
        return
    probe = Path(folder, f".shared-{broadcast_from_coordinator(random.getrandbits(31))}")
    if is_coordinator():
        probe.touch()
    barrier("workdir_probe")
    deadline = time.monotonic() + _SHARED_SECONDS
    while not (is_seen := probe.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    barrier("workdir_probe_done")
    if is_coordinator():
        probe.unlink()
    advice = "use a --workdir on a shared file system"
    check_same(str(is_seen), f"does not see {folder} of process 0; {advice}")
