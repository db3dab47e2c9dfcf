"""Checkpoints of a run on disk: which are intact, which to use, and which to keep.

    WORKDIR/checkpoints/N/              complete checkpoint of step N, with its manifest
    WORKDIR/checkpoints/N.unfinished/   being saved or deleted: a killed run loses nothing else
    WORKDIR/checkpoints_damaged/N/      quarantined corrupt checkpoints, never deleted

A checkpoint gets its final name only after its manifest is written.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Collection, Mapping
from typing import NamedTuple

from absl import logging

from simplernn_jax.checkpoint import manifest
from simplernn_jax.checkpoint.contents import QUALITY_ITEM, Quality, saved_quality, saved_step
from simplernn_jax.errors import UserError
from simplernn_jax.files import check_output, sync

BEST = "best"
NEWEST = "newest"

UNFINISHED_MARK = ".unfinished"

_STEP = re.compile(r"0|[1-9][0-9]{0,9}")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_UNREADABLE = ("\\", "gs:/")
"""Unsupported parts of a path: TensorStore does not find its files with the first, and Orbax takes
the second for the address of a bucket, anywhere in a path."""
_UNWRITABLE = (*_UNREADABLE, "[", "*", "?")
"""The same, and those that Orbax takes for a pattern when it searches for the files it wrote."""


def check_workdir(workdir: str) -> None:
    """Check that checkpoints can be saved below `workdir`, whether or not it exists.

    Raises:
      UserError: it is not a path or it is a URL, or its absolute path has characters that Orbax or
        TensorStore interpret.
    """
    _check_path(workdir, _UNWRITABLE)


def _check_path(workdir: str, unsupported: Collection[str]) -> None:
    if not isinstance(workdir, str) or not workdir or "\0" in workdir:
        raise UserError(f"workdir={workdir!r}: must be the path of a folder, as text")
    if _SCHEME.match(workdir):
        raise UserError(
            f"--workdir {workdir}: not a folder; mount the bucket and use its mount point, "
            "or choose a local folder"
        )
    path = os.path.abspath(workdir)
    found = [part for part in unsupported if part in f"{path}/"]
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        found.append("bytes that are not UTF-8")
    if found:
        raise UserError(
            f"--workdir {path}: has {' and '.join(found)} in its path, which checkpoints do "
            "not support; rename that folder, or use a symbolic link without them"
        )


class CheckpointFolder:
    """Checkpoints below one workdir. Paths are absolute."""

    def __init__(self, workdir: str) -> None:
        _check_path(workdir, _UNREADABLE)
        workdir = os.path.abspath(workdir)
        self.path = os.path.join(workdir, "checkpoints")
        self.corrupt_path = os.path.join(workdir, "checkpoints_damaged")
        self._lock_path = os.path.join(self.path, "lock")
        self._lock: int | None = None

    def step_path(self, step: int) -> str:
        """Return the folder of one checkpoint."""
        return os.path.join(self.path, str(step))

    def unfinished_path(self, step: int) -> str:
        """Return the folder that `mark_complete` turns into the checkpoint of `step`."""
        return self.step_path(step) + UNFINISHED_MARK

    def steps(self) -> list[int]:
        """List the steps of all complete checkpoints, intact or not, ascending."""
        if not os.path.isdir(self.path):
            return []
        names = [name for name in os.listdir(self.path) if _STEP.fullmatch(name)]
        return sorted(int(name) for name in names if os.path.isdir(os.path.join(self.path, name)))

    def open_for_training(self) -> None:
        """Lock the folder, or raise `UserError`, and delete what a killed run left unfinished."""
        check_workdir(os.path.dirname(self.path))
        os.makedirs(self.path, exist_ok=True)
        try:
            check_output(self._lock_path)
        except OSError as error:
            what = f"{self._lock_path}: {error.strerror}"
            raise UserError(f"{what}; remove it and run again") from error
        self._take_lock()
        for name in self.discard_unfinished():
            logging.info("discarded an unfinished save: %s", os.path.join(self.path, name))

    def release(self) -> None:
        """Release the lock of `open_for_training`."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def discard_unfinished(self) -> list[str]:
        """Delete what a save or `prune` left unfinished; return the names of these folders."""
        unfinished = [name for name in os.listdir(self.path) if UNFINISHED_MARK in name]
        for name in unfinished:
            path = os.path.join(self.path, name)
            if os.path.islink(path) or not os.path.isdir(path):
                os.remove(path)
            else:
                shutil.rmtree(path, ignore_errors=True)  # a reader on NFS may hold a file
        return unfinished

    def mark_complete(self, step: int) -> None:
        """Write the manifest of an unfinished checkpoint and give it its final name."""
        manifest.write_manifest(self.unfinished_path(step))
        os.rename(self.unfinished_path(step), self.step_path(step))
        sync(self.path)

    def prune(self, steps: Collection[int]) -> None:
        """Delete the checkpoints of `steps`; a kill leaves none of them half deleted."""
        for step in steps:
            os.rename(self.step_path(step), self.unfinished_path(step))
            shutil.rmtree(self.unfinished_path(step), ignore_errors=True)

    def find_corruption(self, step: int, parts: Collection[str] | None = None) -> str | None:
        """Return a phrase that says how the checkpoint of `step` is corrupted, or None.

        `parts` is as in `newest_intact`.
        """
        path = self.step_path(step)
        defect = manifest.find_corruption(path, None if parts is None else {*parts, QUALITY_ITEM})
        if defect is not None:
            return defect
        inside = saved_step(path)
        return None if inside == step else f"it is a copy of step {inside}"

    def newest_intact(self, parts: Collection[str] | None = None) -> int | None:
        """Find the newest step whose files are all as written; quarantine corrupt newer ones.

        Args:
          parts: the only items whose bytes are verified, for a caller that reads no others.

        Returns:
          None if there is no checkpoint.

        Raises:
          UserError: there are corrupt checkpoints only.
        """
        for step in reversed(self.steps()):
            defect = self.find_corruption(step, parts)
            if defect is None:
                return step
            self.quarantine(step, defect)
        if os.path.isdir(self.corrupt_path):
            raise UserError(
                f"no intact checkpoint is left in {self.path} (corrupted ones are in "
                f"{self.corrupt_path}): restore an intact copy, use another --workdir, or delete "
                f"{self.corrupt_path} to start from the beginning"
            )
        return None

    def quarantine(self, step: int, defect: str) -> None:
        """Move a corrupt checkpoint to `corrupt_path`, with a warning that says `defect`.

        Raises:
          UserError: it cannot be moved.
        """
        source, number = self.step_path(step), 1
        if not os.path.isdir(source):  # a run that is training here has just pruned it
            return
        target = os.path.join(self.corrupt_path, str(step))
        while os.path.lexists(target):
            number += 1
            target = os.path.join(self.corrupt_path, f"{step}-{number}")
        try:
            os.makedirs(self.corrupt_path, exist_ok=True)
            os.rename(source, target)
        except OSError as error:
            raise UserError(
                f"the checkpoint {source} is corrupted: {defect}; it cannot be moved to {target} "
                f"({error.strerror}): move it, or allow writing there"
            ) from error
        logging.warning(
            "checkpoint %s is corrupted: %s; moved to %s, looking for an earlier one",
            *(source, defect, target),
        )

    def _take_lock(self) -> None:
        self._lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise UserError(
                f"another process is training in {os.path.dirname(self.path)}: wait until it "
                "ends, or choose another --workdir"
            ) from error
        except OSError:
            logging.info("no file locks on this file system: %s", self.path)


class Choice(NamedTuple):
    """An intact checkpoint, and the reason for choosing it."""

    step: int
    path: str
    reason: str | None
    """One line for the user; None where there was nothing to choose."""


def choose_checkpoint(workdir: str, checkpoint: str | int = BEST) -> Choice:
    """Choose an intact checkpoint of the run in `workdir`; quarantine corrupt ones.

    Args:
      workdir: folder of a training run.
      checkpoint: ``best``, the lowest validation loss if all checkpoints that were evaluated were
        so on the same tokens, else the newest; ``newest``; or a step.

    Raises:
      UserError: `workdir` has no checkpoint, none that is intact, or none of that step.
    """
    folder = CheckpointFolder(workdir)
    checkpoint = str(checkpoint)  # also an array, which does not compare with a text
    if checkpoint not in (BEST, NEWEST):
        return _choose_step(folder, checkpoint)
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
    if checkpoint == BEST and len(folder.steps()) > 1:
        is_measured = bool(_measured(qualities))
        why = (
            "validation losses cannot be compared" if is_measured else "none has a validation loss"
        )
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


def _choose_step(folder: CheckpointFolder, checkpoint: str) -> Choice:
    steps = folder.steps()
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
    """Read the evaluations by step, without checkpoints whose record is corrupt."""
    qualities = {}
    for step in folder.steps():
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
    if len(predictions) != 1:
        return None
    return min(measured, key=lambda step: (measured[step].validation_loss, -step))


def _reason(best: int, qualities: dict[int, Quality | None]) -> str | None:
    if len(qualities) == 1:
        return None
    quality, newest = qualities[best], max(qualities)
    assert quality is not None
    loss = f"{quality.validation_loss:.4f} on {quality.predictions:,} predictions"
    if newest == best:
        return f"checkpoint: step {best}, the newest and the best by validation loss ({loss})"
    other = qualities[newest]
    what = "was not evaluated" if other is None else f"has {other.validation_loss:.4f}"
    return (
        f"checkpoint: step {best}, the best by validation loss ({loss}; the newest, step {newest}, "
        f"{what})"
    )
