"""The files of one tokenized corpus: written once and atomically, fully verified before use.

NAME/train.tokens        token ids, unsigned
NAME/train.starts        positions of the first token of each document, int64
NAME/train.targets       whether each token is a target of the loss, bool; only if some are not
NAME/validation.*        the same, unless everything trains
NAME/meta.json           dtype, sizes and SHA-256 of these files, sealed (`files`)
"""

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from simplernn_jax.data.spool import TOKEN_DTYPES, SplitPlan, Spool
from simplernn_jax.files import open_file, read_sealed, sha256_hex, sync, write_sealed

_META_FILE = "meta.json"
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.ENXIO)
_DAMAGE = (*_NO_FILE, errno.EIO)
"""Errors from reading a corrupted store; other ones are the machine's."""
_TEMPORARY_SUFFIX = ".tmp"
_ABANDONED_SECONDS = 3600


class DamagedStore(Exception):
    """Name and fault of a file of a store that is not as it was written."""


@dataclasses.dataclass(frozen=True)
class TokenSplit:
    """One side of the split: consecutive documents, each BOS, its tokens, EOS."""

    name: str
    """``train`` or ``validation``."""
    tokens: np.ndarray
    """[N] memory-mapped ids, the smallest unsigned dtype that holds the vocabulary."""
    document_starts: np.ndarray
    """[documents] int64, position of the first token of each document. A position split cuts one
    document: its rest begins the validation split at 0, without a BOS."""
    num_bytes: int
    """UTF-8 bytes of its targets."""
    content_hash: str
    """SHA-256 of the tokens, the document starts and the targets."""
    targets: np.ndarray | None = None
    """[N] memory-mapped bool, whether a token is a target of the loss; None: all that follow
    another in their document."""

    @property
    def num_predictions(self) -> int:
        """Number of targets: tokens that follow another one in their document."""
        if self.targets is not None:
            return int(np.count_nonzero(self.targets))
        return len(self.tokens) - len(self.document_starts)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Create a temporary folder next to `folder`, and sync and rename it to `folder` on leaving.

    If the block raises, the temporary folder is removed; if the process is killed, it stays under
    its own name and is removed by a later call. If another process was faster, its folder stays
    and ours is dropped.

    Raises:
      OSError: the disk is full or not writable.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}{_TEMPORARY_SUFFIX}"
    temporary.mkdir()
    try:
        yield temporary
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        try:
            os.rename(temporary, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    """Remove what killed writers left; a live one has written something within the hour."""
    limit = time.time() - _ABANDONED_SECONDS
    for temporary in parent.glob(f".*{_TEMPORARY_SUFFIX}"):
        with contextlib.suppress(OSError):  # gone meanwhile, or not a writer's
            if all(path.stat().st_mtime < limit for path in [temporary, *temporary.iterdir()]):
                shutil.rmtree(temporary, ignore_errors=True)


def write_store(folder: Path, name: str, plans: list[SplitPlan], spool: Spool) -> None:
    """Write the files of the store `name` into a temporary folder.

    Raises:
      OSError: the disk is full or not writable.
    """
    splits = {plan.name: _write_split(folder, plan, spool) for plan in plans}
    meta = {"store": name, "dtype": spool.dtype.str, "splits": splits}
    write_sealed(folder / _META_FILE, json.dumps(meta, indent=2) + "\n")


def _write_split(folder: Path, plan: SplitPlan, spool: Spool) -> dict[str, Any]:
    both, tokens = hashlib.sha256(), hashlib.sha256()
    with open(folder / f"{plan.name}.tokens", "wb") as stream:
        for block in spool.blocks(plan.ranges):
            stream.write(block.data)
            tokens.update(block.data)
            both.update(block.data)
    starts = plan.document_starts.astype("<i8")
    starts.tofile(folder / f"{plan.name}.starts")
    both.update(starts.data)
    record = {}
    if not spool.piece_targets.all():
        targets = hashlib.sha256()
        with open(folder / f"{plan.name}.targets", "wb") as stream:
            for block in spool.target_blocks(plan.ranges):
                stream.write(block.data)
                targets.update(block.data)
                both.update(block.data)
        record["targets_sha256"] = targets.hexdigest()
    return record | {
        "tokens": int((plan.ranges[:, 1] - plan.ranges[:, 0]).sum()),
        "documents": len(starts),
        "num_bytes": plan.num_bytes,
        "content_hash": both.hexdigest(),
        "tokens_sha256": tokens.hexdigest(),
        "starts_sha256": sha256_hex(starts.data),
    }


def open_store(folder: Path) -> list[TokenSplit]:
    """Verify every byte of a store and map its tokens; reads 1 to 2 GB a second.

    Raises:
      DamagedStore: a file is missing, not a regular file, or not what was written.
      OSError: the machine has no memory or no file descriptor for it.
    """
    meta = _read_meta(folder)
    dtype = np.dtype(meta["dtype"])
    return [_open_split(folder, name, dtype, split) for name, split in meta["splits"].items()]


def content_hashes(folder: Path) -> list[str]:
    """Read the recorded content hashes of the splits, not the tokens themselves.

    Raises:
      DamagedStore: the record is missing or is not what was written.
    """
    return [split["content_hash"] for split in _read_meta(folder)["splits"].values()]


def remove_store(folder: Path) -> None:
    """Remove whatever is at the path of a store; a link, but not its target.

    Raises:
      OSError: it cannot be removed.
    """
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def _read_meta(folder: Path) -> dict[str, Any]:
    body = read_sealed(folder / _META_FILE)
    if body is None:
        # Stores of earlier versions have no seal.
        raise DamagedStore(f"{_META_FILE} is missing, was changed or is of another version")
    try:
        meta: dict[str, Any] = json.loads(body)
        if not all(_is_record(split) for split in meta["splits"].values()):
            raise TypeError
        store, dtype = meta["store"], meta["dtype"]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise DamagedStore(f"{_META_FILE} is not a record of a corpus") from error
    if store != folder.name:
        raise DamagedStore(f"{_META_FILE} is that of another corpus")
    if dtype not in TOKEN_DTYPES:
        raise DamagedStore(f"{_META_FILE} names the dtype {dtype}, which tokens never have")
    return meta


def _is_record(split: dict[str, Any]) -> bool:
    """Whether it has the fields of `_write_split`; of another type it raises an exception."""
    counts = [split[name] for name in ("tokens", "documents", "num_bytes")]
    hashes = [split[name] for name in ("content_hash", "tokens_sha256", "starts_sha256")]
    hashes.append(split.get("targets_sha256", ""))
    return all(type(x) is int for x in counts) and all(type(x) is str for x in hashes)


def _open_split(folder: Path, name: str, dtype: np.dtype, split: dict[str, Any]) -> TokenSplit:
    size = split["tokens"] * dtype.itemsize
    with _verified(folder / f"{name}.tokens", size, split["tokens_sha256"]) as file:
        tokens = np.memmap(file, dtype, "r")
    size = split["documents"] * 8
    with _verified(folder / f"{name}.starts", size, split["starts_sha256"]) as file:
        starts = np.fromfile(file, "<i8")
    targets = None
    if "targets_sha256" in split:
        path = folder / f"{name}.targets"
        with _verified(path, split["tokens"], split["targets_sha256"]) as file:
            targets = np.memmap(file, np.bool_, "r")
    return TokenSplit(name, tokens, starts, split["num_bytes"], split["content_hash"], targets)


@contextlib.contextmanager
def _verified(path: Path, size: int, sha256: str) -> Iterator[io.BufferedReader]:
    """Open a file after checking its size and SHA-256."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open_file(path))
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise DamagedStore(f"{path.name} has {found:,} bytes instead of {size:,}")
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise DamagedStore(f"{path.name} was changed")
        except OSError as error:
            if error.errno not in _DAMAGE:
                raise
            raise DamagedStore(f"{path.name}: {error.strerror}") from error
        file.seek(0)
        yield file
