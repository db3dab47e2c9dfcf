"""Progress of a run that is saved with every checkpoint: summed losses and validation losses."""

import dataclasses
import math

from simplernn_jax.errors import counted
from simplernn_jax.training.evaluate import Evaluation

OVERFITTING_MARGIN = 0.01
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
        if higher >= OVERFITTING_MARGIN * self.best_loss:
            lines["overfitting"] = (
                "train on more text, with --config.model.dropout, or for fewer steps; --checkpoint "
                "best loads the best model saved (make eval_every a multiple of save_every)"
            )
        return lines
