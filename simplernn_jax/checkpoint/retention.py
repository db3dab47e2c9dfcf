"""Which checkpoints of a run are kept."""

from collections.abc import Sequence
from typing import Any

import orbax.checkpoint as ocp

from simplernn_jax.checkpoint.contents import Quality


class KeepLastAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the `keep_last` newest steps (at least 1) and the `keep_best` of lowest loss.

    Losses over another number of predictions than the newest one's are of other tokens and do not
    count.

    Orbax's own LatestN and BestN would do, but for a restart: it then reads the losses of all
    checkpoints from a file of its own, before any damage to it can be found.
    """

    def __init__(self, keep_last: int, keep_best: int) -> None:
        self._keep_last = keep_last
        self._keep_best = keep_best
        self._quality: dict[int, Quality] = {}

    def add(self, step: int, quality: Quality | None) -> None:
        """Notes how `step` was evaluated; None if it was not."""
        if quality is not None:
            self._quality[step] = quality

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """For each of Orbax's checkpoints, in ascending order, whether it stays."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        measured = {step: self._quality[step] for step in steps if step in self._quality}
        if measured:
            predictions = measured[max(measured)].predictions
            measured = {s: q for s, q in measured.items() if q.predictions == predictions}
        # Of equal losses the newest, as in `checkpoint_choice`.
        by_loss = sorted(measured, key=lambda step: (measured[step].validation_loss, -step))
        kept = by_loss[: self._keep_best] + steps[-self._keep_last :]
        return [step in kept for step in steps]
