"""A training run: what is fixed before its first step, and what its checkpoints carry over."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from simplernn_jax import config as config_lib
from simplernn_jax.checkpoint.checkpointer import Checkpointer
from simplernn_jax.checkpoint.file_layout import FileLayout
from simplernn_jax.checkpoint.folder import check_workdir
from simplernn_jax.config import Config
from simplernn_jax.data.batches import Batch, make_batches
from simplernn_jax.data.token_store import TokenizedCorpus
from simplernn_jax.errors import UserError
from simplernn_jax.sharding.agreement import broadcast_from_coordinator
from simplernn_jax.sharding.global_arrays import from_rows, rows_of_this_process
from simplernn_jax.sharding.mesh import BATCH_AXES, check_fits, make_mesh
from simplernn_jax.training.early_stopping import ValidationHistory
from simplernn_jax.training.evaluate import Evaluation
from simplernn_jax.training.memory_check import check_memory
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.placement import batch_shardings
from simplernn_jax.training.preparation import changed_fields, prepare, total_steps
from simplernn_jax.training.step_statistics import LossTotals
from simplernn_jax.training.train_step import TrainState, init_train_state, state_shardings


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is fixed before the first step."""

    config: Config
    """As checkpoints store it (`prepare`)."""
    workdir: str
    mesh: Mesh
    corpus: TokenizedCorpus
    total_steps: int
    optimizer: optax.GradientTransformation


def set_up(config: Config, workdir: str) -> Setup:
    """Check everything that can be checked before the first step.

    Raises:
      UserError: the data is unusable, the workdir holds a run of another model, or the model does
        not fit the mesh or its memory.
    """
    config_lib.validate(config)
    check_workdir(workdir)
    workdir = os.path.abspath(workdir)
    os.makedirs(workdir, exist_ok=True)
    mesh = make_mesh(config.mesh)
    config, corpus = prepare(config, workdir)
    check_fits(config, mesh)
    steps = total_steps(config, corpus)
    optimizer = make_optimizer(config.optimizer, steps, mesh)
    check_memory(config, optimizer, mesh)
    return Setup(config, workdir, mesh, corpus, steps, optimizer)


@dataclasses.dataclass(kw_only=True)
class Run:
    """Everything that changes from step to step."""

    setup: Setup
    state: TrainState
    """After step `step`."""
    step: int
    position: Any
    """Position in the data from which step ``step + 1`` takes its batch, JSON-able."""
    totals: LossTotals
    history: ValidationHistory
    batches: Any
    """Iterator over this process's part of the batches (`make_batches`)."""
    local_sequences: slice
    """This process's part of a batch."""
    checkpointer: Checkpointer
    layout: FileLayout
    changes: list[str]
    """Fields of the configuration that differ from the checkpoint's, one line each."""
    latest_evaluation: tuple[int, Evaluation] | None = None
    """The last evaluation of this process, and its step."""
    stopped_early: bool = False

    def __post_init__(self) -> None:
        self.first_step = self.step
        self.check_early_stopping()

    @property
    def has_ended(self) -> bool:
        """Whether no step is left."""
        return self.step >= self.setup.total_steps or self.stopped_early

    def check_early_stopping(self) -> None:
        """Let the coordinator decide whether the validation loss has stopped improving."""
        patience = self.setup.config.train.stop_after_worse
        self.stopped_early = patience > 0 and bool(
            broadcast_from_coordinator(self.history.is_exhausted(patience))
        )

    def next_batch(self) -> Batch:
        """Return the next batch on the devices."""
        batch, shardings = next(self.batches), batch_shardings(self.setup.mesh)
        if shardings is None:
            return jax.device_put(batch)
        batch_size = self.setup.config.data.batch_size
        return from_rows(batch, shardings, self.local_sequences.start, batch_size)

    def save(self, *, wait: bool = False) -> None:
        """Save a checkpoint, in the background unless `wait`.

        Raises:
          UserError: see `Checkpointer.save`.
        """
        data_state = {
            "batches": self.position,
            "content_hash": self.setup.corpus.content_hash,
            "progress": dataclasses.asdict(self.totals),
            "evaluations": dataclasses.asdict(self.history),
        }
        metrics = None
        if self.latest_evaluation is not None and self.latest_evaluation[0] == self.step:
            result = self.latest_evaluation[1]
            metrics = {"validation_loss": result.nats_per_token, "predictions": result.predictions}
        state = self.layout.to_files(self.state)
        self.checkpointer.save(self.step, state, data_state, metrics, wait=wait)


@contextlib.contextmanager
def start_or_resume(setup: Setup) -> Iterator[Run]:
    """Start a run, or resume it from the newest valid checkpoint in its workdir.

    The last save is complete when the ``with`` block has ended.

    Raises:
      UserError: the checkpoint is of other data, another process trains there, or a save failed.
    """
    config = setup.config
    layout = FileLayout(config, setup.optimizer, setup.mesh)
    checkpointer = Checkpointer(
        setup.workdir,
        config,
        setup.corpus.tokenizer.to_json(),
        keep_last=config.train.keep_last,
        keep_best=config.train.keep_best,
    )
    try:
        yield _make_run(setup, checkpointer, layout)
    except BaseException:
        checkpointer.close(failed=True)
        raise
    checkpointer.close()


def _make_run(setup: Setup, checkpointer: Checkpointer, layout: FileLayout) -> Run:
    config, corpus = setup.config, setup.corpus
    sharding = NamedSharding(setup.mesh, PartitionSpec(BATCH_AXES))
    local = rows_of_this_process(sharding, config.data.batch_size)
    seed, pad_id = config.train.seed, corpus.tokenizer.pad_id
    batches = make_batches(corpus.train, config.data, seed, pad_id, local)
    totals, history, changes = LossTotals(), ValidationHistory(), []
    restored = checkpointer.restore(layout.abstract, layout.shardings)
    if restored is None:
        state = jax.jit(
            lambda: init_train_state(config, setup.optimizer),
            out_shardings=state_shardings(config, setup.optimizer, setup.mesh),
        )()
    else:
        saved = restored.data_state
        if saved["content_hash"] != corpus.content_hash:
            raise UserError(
                f"the text of {config.data.source!r} or its tokenizer is not what the run in "
                f"{setup.workdir} was trained on; give it the same text, or use another --workdir"
            )
        batches.set_state(saved["batches"])
        # Earlier versions saved neither.
        totals = LossTotals(**(saved.get("progress") or {"tokens": None}))
        history = ValidationHistory(**(saved.get("evaluations") or {}))
        changes = changed_fields(config, restored.config)
        state = layout.from_files(restored.state)
    return Run(
        setup=setup,
        state=state,
        step=int(state.step),
        position=batches.get_state(),
        totals=totals,
        history=history,
        batches=batches,
        local_sequences=local,
        checkpointer=checkpointer,
        layout=layout,
        changes=changes,
    )
