"""Choice of checkpoints: the one to use (best, newest, or of a step), and those to keep."""

from collections.abc import Mapping
from typing import NamedTuple

from absl import logging

from simplernn_jax.checkpoint.contents import QUALITY_ITEM, Quality, saved_quality
from simplernn_jax.checkpoint.folder import CheckpointFolder
from simplernn_jax.errors import UserError

BEST = "best"
NEWEST = "newest"


class Choice(NamedTuple):
    """An intact checkpoint, and the reason for choosing it."""

    step: int
    path: str
    reason: str | None
    """One line for the user; None where there was nothing to choose."""


def choose_checkpoint(workdir: str, checkpoint: str | int = BEST) -> Choice:
    """Choose an intact checkpoint of the run in `workdir`; quarantine corrupted ones.

    Args:
      workdir: folder of a training run.
      checkpoint: ``best``, the lowest validation loss if all checkpoints that were evaluated were
        so on the same tokens, else the newest; ``newest``; or a step.

    Raises:
      UserError: `workdir` has no checkpoint, none that is intact, or not that of the step.
    """
    folder = CheckpointFolder(workdir)
    checkpoint = str(checkpoint)  # also an array, which does not compare with a text
    if checkpoint not in (BEST, NEWEST):
        return _of_step(folder, checkpoint)
    while checkpoint == BEST:
        qualities = _qualities(folder)
        best = _best(qualities)
        if best is None:
            break
        defect = folder.find_corruption(best)
        if defect is None:
            return Choice(best, folder.step_path(best), _reason(best, qualities))
        folder.quarantine(best, defect)
    step = folder.newest_intact()
    if step is None:
        raise UserError(f"no checkpoint in {workdir}: train there first, or use another --workdir")
    reason = None
    if checkpoint == BEST and len(folder.complete_steps()) > 1:
        why = "none has a validation loss"
        if _measured(qualities):
            why = "validation losses cannot be compared"
        reason = f"checkpoint: step {step}, the newest ({why})"
    return Choice(step, folder.step_path(step), reason)


def steps_to_keep(
    qualities: Mapping[int, Quality | None], keep_last: int, keep_best: int
) -> set[int]:
    """Return the `keep_last` newest steps (at least 1) and the `keep_best` of lowest loss.

    Losses over a different number of predictions than the newest one's are of different tokens and
    do not count.
    """
    steps = sorted(qualities)
    measured = _measured(qualities)
    predictions = measured[max(measured)].predictions if measured else None
    by_loss = sorted(
        (quality.validation_loss, -step)
        for step, quality in measured.items()
        if quality.predictions == predictions
    )
    return {-step for _, step in by_loss[:keep_best]} | set(steps[-keep_last:])


def _of_step(folder: CheckpointFolder, checkpoint: str) -> Choice:
    steps = folder.complete_steps()
    if not (checkpoint.isascii() and checkpoint.isdecimal()):
        raise UserError(f"--checkpoint={checkpoint}: specify best, newest or a step")
    step = next((step for step in steps if str(step) == checkpoint), None)
    if step is None:
        found = ", ".join(map(str, steps)) or "none"
        raise UserError(f"--checkpoint={checkpoint}: {folder.path} has only these steps: {found}")
    defect = folder.find_corruption(step)
    if defect is not None:
        raise UserError(
            f"--checkpoint={step}: {folder.step_path(step)} is corrupted: {defect}; choose another"
        )
    return Choice(step, folder.step_path(step), None)


def _qualities(folder: CheckpointFolder) -> dict[int, Quality | None]:
    """Read the evaluations by step, without checkpoints whose record is corrupted."""
    qualities = {}
    for step in folder.complete_steps():
        defect = folder.find_corruption(step, [QUALITY_ITEM])
        if defect is None:
            qualities[step] = saved_quality(folder.step_path(step))
        else:
            logging.warning("checkpoint %s is corrupted: %s", folder.step_path(step), defect)
    return qualities


def _measured(qualities: Mapping[int, Quality | None]) -> dict[int, Quality]:
    return {step: quality for step, quality in qualities.items() if quality is not None}


def _best(qualities: dict[int, Quality | None]) -> int | None:
    """Return the newest step of lowest loss; None if losses are missing or not comparable."""
    measured = _measured(qualities)
    predictions = {quality.predictions for quality in measured.values()}
    if len(predictions) != 1 or None in predictions:
        return None
    return min(measured, key=lambda step: (measured[step].validation_loss, -step))


def _reason(best: int, qualities: dict[int, Quality | None]) -> str | None:
    if len(qualities) == 1:
        return None
    quality, newest = qualities[best], max(qualities)
    loss = ""
    if quality is not None:
        loss = f"{quality.validation_loss:.4f} on {quality.predictions:,} predictions"
    if newest == best:
        return f"checkpoint: step {best}, the newest and the best by validation loss ({loss})"
    other = qualities[newest]
    what = "was not evaluated" if other is None else f"has {other.validation_loss:.4f}"
    return (
        f"checkpoint: step {best}, the best by validation loss ({loss}; the newest, step {newest}, "
        f"{what})"
    )
