"""Which checkpoints of a run are kept."""

from collections.abc import Sequence
from typing import Any

import orbax.checkpoint as ocp


class KeepLastAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the `keep_last` newest steps (at least 1) and the `keep_best` of lowest loss.

    Orbax's own LatestN and BestN would do, but for a restart: it then reads the losses of all
    checkpoints from a file of its own, before any damage to it can be found.
    """

    def __init__(self, keep_last: int, keep_best: int) -> None:
        self._keep_last = keep_last
        self._keep_best = keep_best
        self._quality: dict[int, float] = {}

    def add(self, step: int, quality: float | None) -> None:
        """Notes the validation loss of `step`; None if it has none."""
        if quality is not None:
            self._quality[step] = quality

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """For each of Orbax's checkpoints, in ascending order, whether it stays."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        measured = [step for step in steps if step in self._quality]
        kept = sorted(measured, key=self._quality.__getitem__)[: self._keep_best]
        kept += steps[-self._keep_last :]
        return [step in kept for step in steps]
