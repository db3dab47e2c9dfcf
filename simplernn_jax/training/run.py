"""A training run: its data, its state, its progress and its checkpoints."""

import dataclasses
import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from simplernn_jax import config as config_lib
from simplernn_jax.checkpoint.checkpointer import Checkpointer
from simplernn_jax.checkpoint.folder import Quality, check_workdir
from simplernn_jax.config import Config, differing_fields
from simplernn_jax.data.batches import Batch, make_batches
from simplernn_jax.errors import UserError, counted
from simplernn_jax.models.language_model import abstract_model, check_mesh
from simplernn_jax.parallel.distributed import broadcast_from_coordinator
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
from simplernn_jax.training.preparation import prepare, total_steps
from simplernn_jax.training.train_step import (
    TrainState,
    batch_shardings,
    check_memory,
    init_train_state,
    state_shardings,
    state_specs,
)
from simplernn_jax.training.tuning import init_tuned

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
        single = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, pipeline=1))
        self.abstract: TrainState = jax.eval_shape(lambda: init_train_state(single, optimizer))
        """Names, shapes and dtypes of the state in checkpoints."""
        self.shardings = state_shardings(single, optimizer, mesh)
        """Shardings of its arrays; None on one device."""
        self.to_checkpoint: Callable[[TrainState], TrainState] = lambda state: state
        self.from_checkpoint = self.to_checkpoint
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
        self.config, self.corpus, params = prepare(config, self.workdir)
        check_fits(self.config, self.mesh)
        check_mesh(self.config.model, self.mesh)
        self.total_steps = total_steps(self.config, self.corpus)
        self.optimizer = make_optimizer(self.config.optimizer, self.total_steps, self.mesh)
        check_memory(self.config, self.optimizer, self.mesh)
        self._layout = CheckpointLayout(self.config, self.optimizer, self.mesh)
        self.totals, self.history = LossTotals(), ValidationHistory()
        self.changes: list[str] = []
        """Fields of the configuration that differ from the checkpoint's, one line each."""
        self._checkpointer = Checkpointer(
            self.workdir,
            self.config,
            self.corpus.tokenizer.to_json(),
            keep_last=config.train.keep_last,
            keep_best=config.train.keep_best,
        )
        try:
            self.state, self._batches = self._start_or_resume(params)
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

    def _start_or_resume(self, params: nnx.State | None) -> tuple[TrainState, Any]:
        """Return state and batches; a new run starts from `params`, if they are given."""
        config, corpus, layout = self.config, self.corpus, self._layout
        sharding = NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))
        self._local_sequences = process_slice(sharding, config.data.batch_size)
        seed, pad_id = config.train.seed, corpus.tokenizer.pad_id
        batches = make_batches(corpus.train, config.data, seed, pad_id, self._local_sequences)
        restored = self._checkpointer.restore(layout.abstract, layout.shardings)
        if restored is None:
            shardings = state_shardings(config, self.optimizer, self.mesh)
            init = jax.jit(
                lambda: init_train_state(config, self.optimizer), out_shardings=shardings
            )
            state: TrainState = init()
            if params is not None:
                if layout.shardings is not None:
                    whole = jax.tree.map(np.asarray, params)
                    params = jax.device_put(whole, layout.shardings.params)
                tuned = jax.jit(
                    partial(init_tuned, config, abstract_model(config.model)[0]),
                    out_shardings=layout.shardings and layout.shardings.tuned,
                )(params)
                saved_state = layout.to_checkpoint(state)
                saved_state = dataclasses.replace(saved_state, params=params, tuned=tuned)
                state = layout.from_checkpoint(saved_state)
            return state, batches
        saved_state, saved, saved_config = restored
        if saved["content_hash"] != corpus.content_hash:
            raise UserError(
                f"{self.workdir} was trained on different text or with another tokenizer than "
                f"{config.data.source!r}; use {saved_config.data.source!r}, or another --workdir"
            )
        batches.set_state(saved["batches"])
        self.totals = LossTotals(**saved["progress"])
        self.history = ValidationHistory(**saved["evaluations"])
        changes = differing_fields(config, saved_config)
        changes.pop("data.cache_dir", None)  # which has no effect on training
        self.changes = list(changes.values())
        return layout.from_checkpoint(saved_state), batches

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

    def rewind(self, position: Any) -> None:
        """Return to an earlier `position` in the data."""
        self._batches.set_state(position)
        self.position = position

    @property
    def schedule(self) -> np.ndarray:
        """The ``steps`` of `make_optimizer`."""
        return np.array([self.config.optimizer.warmup_steps, self.total_steps], np.int32)

    def save(self, *, wait: bool = False) -> None:
        """Save a checkpoint as `Checkpointer.save` does, in the background unless `wait`."""
        data_state = {
            "batches": self.position,
            "content_hash": self.corpus.content_hash,
            "progress": dataclasses.asdict(self.totals),
            "evaluations": dataclasses.asdict(self.history),
        }
        quality, history = None, self.history
        if history.last_step == self.step and history.last_loss is not None:
            quality = Quality(history.last_loss, history.predictions)
        state = self._layout.to_checkpoint(self.state)
        self._checkpointer.save(self.step, state, data_state, quality, wait=wait)
