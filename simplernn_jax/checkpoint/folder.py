"""Checkpoints of a run on disk: what they hold, which are intact, and which to use and to keep.

    WORKDIR/checkpoints/N/              complete checkpoint of step N, with its manifest
    WORKDIR/checkpoints/N.unfinished/   being saved or deleted: a killed run loses nothing else
    WORKDIR/checkpoints_damaged/N/      quarantined corrupt checkpoints, never deleted

A checkpoint has the items ``state`` (arrays named by their path), ``data`` (position), ``config``,
``tokenizer`` and ``quality`` (JSON). Nothing in them is executed. It gets its final name only after
its manifest is written, which lists every file with its size and SHA-256, and ends in a line with
the SHA-256 of the lines above it (`files.write_sealed`).
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from simplernn_jax import config as config_lib
from simplernn_jax.config import Config
from simplernn_jax.errors import UserError
from simplernn_jax.files import (
    check_damage,
    open_file,
    read_file,
    read_sealed,
    sync,
    take_lock,
    write_sealed,
)
from simplernn_jax.parallel.named_leaves import named_leaves

BEST = "best"
NEWEST = "newest"

UNFINISHED_MARK = ".unfinished"

TEXTS = ("config", "tokenizer")
"""Items that `read_texts` reads."""
_QUALITY = "quality"
_MAX_JSON_BYTES = 1 << 30

_MANIFEST = "manifest.sha256"
_STEP = re.compile(r"0|[1-9][0-9]{0,9}")
_UNSUPPORTED = ("\\", "gs:/", "[", "*", "?")
"""Parts of a path that TensorStore or Orbax interpret: it does not find files behind a backslash,
or takes the path for the address of a bucket or for a pattern."""


def check_workdir(workdir: str) -> None:
    """Check that checkpoints can be saved below `workdir`, whether or not it exists.

    Raises:
      UserError: it is not a path or it is a URL, or its absolute path has characters that Orbax or
        TensorStore interpret.
    """
    if not isinstance(workdir, str) or not workdir or "\0" in workdir:
        raise UserError(f"workdir={workdir!r}: must be the path of a folder, as text")
    if "://" in workdir:
        raise UserError(f"workdir={workdir}: a URL; mount the bucket and use its mount point")
    path = os.path.abspath(workdir)
    found = [part for part in _UNSUPPORTED if part in f"{path}/"]
    if path != path.encode("utf-8", "replace").decode("utf-8"):
        found.append("bytes that are not UTF-8")
    if found:
        raise UserError(
            f"workdir={path}: has {' and '.join(found)} in its path, which checkpoints do "
            "not support; rename that folder, or use a symbolic link without them"
        )


@dataclasses.dataclass(frozen=True)
class Quality:
    """Evaluation by which checkpoints are ranked."""

    validation_loss: float
    """Nats per token, finite; lower is better."""
    predictions: int
    """Number of predictions scored: equal numbers mean equal tokens."""

    def __str__(self) -> str:
        """Return both, for messages."""
        return f"{self.validation_loss:.4f} on {self.predictions:,} predictions"


class CheckpointFolder:
    """Checkpoints below one workdir. Paths are absolute."""

    def __init__(self, workdir: str) -> None:
        check_workdir(workdir)
        workdir = os.path.abspath(workdir)
        self.path = os.path.join(workdir, "checkpoints")
        self.corrupt_path = os.path.join(workdir, "checkpoints_damaged")
        self._lock = filelock.FileLock(os.path.join(self.path, "lock"))

    def step_path(self, step: int) -> str:
        """Return the folder of one checkpoint."""
        return os.path.join(self.path, str(step))

    def unfinished_path(self, step: int) -> str:
        """Return the folder that `mark_complete` turns into the checkpoint of `step`."""
        return self.step_path(step) + UNFINISHED_MARK

    def steps(self) -> list[int]:
        """List the steps of all complete checkpoints, intact or not, ascending."""
        found = Path(self.path).glob("[0-9]*")
        return sorted(
            int(path.name) for path in found if _STEP.fullmatch(path.name) and path.is_dir()
        )

    def open_for_training(self) -> None:
        """Lock the folder, or raise `UserError`, and delete what a killed run left unfinished."""
        workdir = os.path.dirname(self.path)
        os.makedirs(self.path, exist_ok=True)
        try:
            take_lock(self._lock, timeout=0)
        except filelock.Timeout as error:
            raise UserError(
                f"another process is training in {workdir}: wait until it ends, or choose another "
                "workdir"
            ) from error
        self.discard_unfinished()

    def release(self) -> None:
        """Release the lock of `open_for_training`."""
        self._lock.release()

    def discard_unfinished(self) -> None:
        """Delete what a save or `prune` left unfinished."""
        for name in os.listdir(self.path):
            if UNFINISHED_MARK in name:
                logging.info("discarded an unfinished save: %s", os.path.join(self.path, name))
                shutil.rmtree(os.path.join(self.path, name), ignore_errors=True)

    def mark_complete(self, step: int) -> None:
        """Write the manifest of an unfinished checkpoint and give it its final name."""
        write_manifest(self.unfinished_path(step))
        os.rename(self.unfinished_path(step), self.step_path(step))
        sync(self.path)

    def prune(self, keep_last: int, keep_best: int) -> None:
        """Delete the checkpoints that `steps_to_keep` leaves out; a kill leaves none half there."""
        try:
            qualities = self.qualities()
            for step in qualities.keys() - steps_to_keep(qualities, keep_last, keep_best):
                os.rename(self.step_path(step), self.unfinished_path(step))
                shutil.rmtree(self.unfinished_path(step), ignore_errors=True)  # NFS: a reader
        except OSError as error:
            logging.warning("%s: old checkpoints are kept: %s", self.path, error)

    def qualities(self) -> dict[int, Quality | None]:
        """Read the evaluation, None if there was none, of checkpoints that do not look corrupt."""
        return {
            step: read_quality(self.step_path(step))
            for step in self.steps()
            if find_corruption(self.step_path(step), [_QUALITY]) is None
        }

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
            defect = find_corruption(self.step_path(step), parts)
            if defect is None:
                return step
            self.quarantine(step, defect)
        if os.path.isdir(self.corrupt_path):
            raise UserError(
                f"no intact checkpoint is left in {self.path} (corrupted ones are in "
                f"{self.corrupt_path}): restore an intact copy, use another workdir, or delete "
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
            source,
            defect,
            target,
        )


def choose_checkpoint(workdir: str, checkpoint: str | int = BEST) -> tuple[int, str]:
    """Choose an intact checkpoint of the run in `workdir`; quarantine corrupt ones.

    Args:
      workdir: folder of a training run.
      checkpoint: ``best``, the first of `by_loss`, or the newest if none was evaluated;
        ``newest``; or a step.

    Returns:
      Its step, and the reason for choosing it, empty where there was nothing to choose.

    Raises:
      UserError: `workdir` has no checkpoint, none that is intact, or none of that step.
    """
    folder = CheckpointFolder(workdir)
    checkpoint = str(checkpoint)  # also an array, which does not compare with a text
    if checkpoint not in (BEST, NEWEST):
        return _intact_step(folder, checkpoint), ""
    while checkpoint == BEST and (ranked := by_loss(qualities := folder.qualities())):
        step, quality = ranked[0], qualities[ranked[0]]
        defect = find_corruption(folder.step_path(step))
        if defect is None:
            return step, _reason(folder, step, f"the best by validation loss ({quality})")
        folder.quarantine(step, defect)
    newest = folder.newest_intact()
    if newest is None:
        raise UserError(f"no checkpoint in {workdir}: train there first, or use another workdir")
    if checkpoint == NEWEST:
        return newest, ""
    return newest, _reason(folder, newest, "the newest (none was evaluated)")


def _reason(folder: CheckpointFolder, step: int, why: str) -> str:
    return f"checkpoint: step {step}, {why}" if len(folder.steps()) > 1 else ""


def by_loss(qualities: Mapping[int, Quality | None]) -> list[int]:
    """Return the evaluated steps, lowest loss first, and of equal ones the newest.

    Only those that scored as many predictions as the newest of them: others scored other tokens.
    """
    measured = {step: quality for step, quality in qualities.items() if quality is not None}
    predictions = measured[max(measured)].predictions if measured else 0
    losses = [
        (quality.validation_loss, -step)
        for step, quality in measured.items()
        if quality.predictions == predictions
    ]
    return [-step for _, step in sorted(losses)]


def steps_to_keep(
    qualities: Mapping[int, Quality | None], keep_last: int, keep_best: int
) -> set[int]:
    """Return the `keep_last` newest steps (at least 1) and the first `keep_best` of `by_loss`."""
    return {*by_loss(qualities)[:keep_best], *sorted(qualities)[-keep_last:]}


def _intact_step(folder: CheckpointFolder, checkpoint: str) -> int:
    steps = folder.steps()
    if not (checkpoint.isascii() and checkpoint.isdecimal()):
        raise UserError(f"--checkpoint={checkpoint}: specify best, newest or a step")
    step = next((step for step in steps if str(step) == checkpoint), None)
    if step is None:
        found = ", ".join(map(str, steps)) or "none"
        raise UserError(f"--checkpoint={checkpoint}: {folder.path} has only these steps: {found}")
    defect = find_corruption(folder.step_path(step))
    if defect is not None:
        raise UserError(
            f"--checkpoint={step}: {folder.step_path(step)} is corrupted: {defect}; choose another"
        )
    return step


def write_manifest(folder: str) -> None:
    """Flush every file of `folder` to the disk, then add the manifest, atomically.

    When this returns, the folder survives a power failure.

    Raises:
      OSError: the disk is full or fails.
    """
    body = ""
    for name in _file_names(folder):
        path = os.path.join(folder, name)
        sync(path)
        size, digest = _read_digest(path)
        body += f"{digest} {size} {name}\n"
    for parent, _, _ in os.walk(folder, topdown=False):
        sync(parent)
    write_sealed(os.path.join(folder, _MANIFEST), body)


def find_corruption(folder: str, parts: Collection[str] | None = None) -> str | None:
    """Compare `folder` with its manifest: the names and sizes of all files, and every byte.

    With `parts`, only the bytes of files in these folders directly below `folder`.

    Returns:
      None if all is as written, else one phrase that names the first file that is not.

    Raises:
      OSError: a file may not be read, or the machine has no memory or file descriptor for it.
    """
    body = read_sealed(os.path.join(folder, _MANIFEST))
    if body is None:
        return f"{_MANIFEST} is missing or was changed"
    lines = [line.split(" ", 2) for line in body.splitlines()]
    try:
        expected = {name: (int(size), digest) for digest, size, name in lines}
    except ValueError:
        return f"{_MANIFEST} is malformed"
    for name in sorted(expected.keys() ^ set(_file_names(folder))):
        return f"{name} is missing" if name in expected else f"{name} does not belong there"
    for name, (size, digest) in expected.items():
        path = os.path.join(folder, name)
        is_read = parts is None or name.split(os.sep)[0] in parts
        try:
            if os.path.getsize(path) != size:
                return f"{name} has {os.path.getsize(path)} bytes instead of {size}"
            if is_read and _read_digest(path) != (size, digest):
                return f"{name} was changed"
        except OSError as error:
            check_damage(error)
            return f"{name} cannot be read ({error.strerror})"
    return None


def _file_names(folder: str) -> list[str]:
    """List all files below `folder` except the manifest, relative and sorted."""
    names = [
        os.path.relpath(os.path.join(parent, file), folder)
        for parent, _, files in os.walk(folder, onerror=check_damage)
        for file in files
    ]
    return sorted(name for name in names if name != _MANIFEST)


def _read_digest(path: str) -> tuple[int, str]:
    """Return the size and the SHA-256 of a regular file."""
    with open_file(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def read_json(path: str, item: str) -> Any:
    """Read a JSON item of a checkpoint folder; `UserError` if it cannot be read or parsed."""
    file = os.path.join(path, item, "metadata")
    try:
        return json.loads(read_file(file, _MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{file}: {reason}; use another checkpoint") from error


def read_texts(path: str) -> tuple[Config, str]:
    """Read the configuration and the tokenizer's JSON text."""
    config = config_lib.from_json(json.dumps(read_json(path, "config")))
    return config, read_json(path, "tokenizer")


def read_quality(path: str) -> Quality | None:
    """Read the evaluation of a checkpoint; None if there was none."""
    try:
        saved = read_json(path, _QUALITY)
        return Quality(float(saved["validation_loss"]), int(saved["predictions"]))
    except (UserError, KeyError, TypeError, ValueError):
        return None


def read_config(workdir: str) -> tuple[Config, str, int]:
    """Read ``(config, tokenizer_json, step)`` of the newest intact checkpoint; no arrays.

    Raises:
      UserError: `workdir` has no checkpoint, or none that is intact.
    """
    step, _ = choose_checkpoint(workdir, NEWEST)
    return *read_texts(CheckpointFolder(workdir).step_path(step)), step


def saved_leaves(path: str) -> dict[str, Any]:
    """Return ``shape`` and ``dtype`` of every array in the checkpoint folder `path`, by name."""
    handler = ocp.PyTreeCheckpointHandler()
    return dict(handler.metadata(epath.Path(path) / "state").tree)


def read_arrays(
    path: str, names: Sequence[str], shardings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Read the named arrays of the checkpoint folder `path`, bit-exactly; 0 for a missing one.

    Those that have a sharding in `shardings` are JAX arrays with that sharding, the others numpy's.
    """

    def restore_args(name: str) -> ocp.RestoreArgs:
        sharding = shardings.get(name) if shardings else None
        if sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=sharding)

    args = ocp.args.PyTreeRestore(
        dict.fromkeys(names, 0),
        restore_args={name: restore_args(name) for name in names},
        partial_restore=True,
    )
    arrays: dict[str, Any] = ocp.PyTreeCheckpointHandler().restore(
        epath.Path(path) / "state", args=args
    )
    return arrays


def read_tree(path: str, abstract: Any, shardings: Any = None, *, partial: bool = False) -> Any:
    """Read a tree of arrays of the checkpoint folder `path`, bit-exactly.

    Args:
      path: folder of a checkpoint.
      abstract: tree of arrays or `jax.ShapeDtypeStruct`.
      shardings: sharding of each array; None is the default device.
      partial: whether the checkpoint may hold other arrays too.

    Raises:
      UserError: an array is missing or of another shape or dtype.
    """
    wanted, saved = named_leaves(abstract), saved_leaves(path)
    if partial:
        saved = {name: leaf for name, leaf in saved.items() if name in wanted}
    _check_leaves(path, wanted, saved)
    by_name = None if shardings is None else named_leaves(shardings)
    arrays = read_arrays(path, list(wanted), by_name)
    # A copy that JAX owns: an alias of numpy's memory could not be donated.
    leaves = [jnp.array(arrays[name]) for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _check_leaves(path: str, wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise `UserError` for the first leaf of two sets that differs in name, shape or dtype."""

    def describe(leaves: Mapping[str, Any], name: str) -> str:
        leaf = leaves.get(name)
        return "missing" if leaf is None else f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"

    for name in [*wanted, *saved]:
        current, stored = describe(wanted, name), describe(saved, name)
        if current != stored:
            raise UserError(
                f"{path}: does not match this configuration: {name} is {current}, checkpoint has "
                f"{stored}; use the configuration it was saved with, or another --workdir"
            )
