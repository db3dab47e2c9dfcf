"""How far a run has come: tokens since step 0, and the loss since the last row of its metrics."""

import dataclasses
import math
from typing import Any

from simplernn_jax.config import TrainConfig
from simplernn_jax.errors import UserError


@dataclasses.dataclass
class Progress:
    """Saved with every checkpoint, so that rows after a resume are those of a run without one."""

    tokens: int | None = 0
    """Predictions since step 0; None if the run began in a version that did not count them."""
    loss_sum: float = 0.0
    """Nats of all predictions since `take_mean_loss`, but for updates that were skipped."""
    loss_tokens: int = 0
    """Number of them."""

    def add(self, loss: float, predictions: int, *, skipped: bool) -> None:
        """Count a step.

        Args:
          loss: nats per prediction.
          predictions: number of them in the batch.
          skipped: the update was skipped, because the loss or its gradient was not finite.
        """
        if self.tokens is not None:
            self.tokens += predictions
        if not skipped:
            self.loss_sum += loss * predictions
            self.loss_tokens += predictions

    def take_mean_loss(self) -> float:
        """Return nats per prediction since the last call; NaN if all updates were skipped."""
        mean = self.loss_sum / self.loss_tokens if self.loss_tokens else math.nan
        self.loss_sum, self.loss_tokens = 0.0, 0
        return mean

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any] | None) -> "Progress":
        """Return what `to_json` was called on; None is of a checkpoint that has none."""
        if saved is None:
            return cls(tokens=None)
        return cls(saved["tokens"], saved["loss_sum"], saved["loss_tokens"])


def check_finite(step: int, in_a_row: int, config: TrainConfig) -> None:
    """Check that not too many consecutive updates were skipped.

    Args:
      step: the last one.
      in_a_row: number of consecutive updates up to `step` that were skipped.
      config: of the run.

    Raises:
      UserError: as many as ``max_skipped_updates`` were.
    """
    if in_a_row < config.max_skipped_updates:
        return
    steps = "1 step" if in_a_row == 1 else f"{in_a_row} steps in a row"
    raise UserError(
        f"the loss or its gradient was not finite in {steps}, up to step {step} (batch {step - 1} "
        f"of seed {config.seed}); the parameters of step {step - in_a_row} are untouched: lower "
        "--config.optimizer.learning_rate"
    )
