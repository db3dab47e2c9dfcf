"""Writing of a token store: split, shards, manifest, and the folder that gets its name at the end.

Documents are stored in a seeded random order, which is known when all of them are counted. So the
tokens are first written to temporary files in source order (`tokenization`), then to the shards.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from absl import logging

from simplernn_jax.data.store_reader import META_FILE, shard_path
from simplernn_jax.data.tokenization import SourceTokens
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.files import sync, write_sealed

SHARD_BYTES = 1 << 28
"""Bytes of a shard, a multiple of `BUFFER_BYTES`."""
BUFFER_BYTES = 1 << 20
"""Bytes that are written at a time, a multiple of the size of a token."""
_RANGES = 1 << 16
"""Documents whose ranges are in memory at a time."""
ABANDONED_SECONDS = 3600
"""Time without a change after which the temporary files of a writer are removed."""
_TEMPORARY = re.compile(r"\.([0-9a-f]{32})\.\w+\.tmp")


@dataclasses.dataclass(frozen=True)
class SplitPlan:
    """One side of the split."""

    name: str
    documents: np.ndarray
    """[documents] int64, in stored order."""
    start: int
    """Position in the source before which it has no token."""
    stop: int
    """Position in the source from which on it has no token."""
    num_bytes: int
    """UTF-8 bytes of its targets."""

    def ranges(self, tokens: SourceTokens) -> Iterator[np.ndarray]:
        """Yield int64 [n, 2], start and stop of each document, a bounded number at a time."""
        for first in range(0, len(self.documents), _RANGES):
            documents = self.documents[first : first + _RANGES]
            starts, stops = tokens.document_starts[documents], tokens.document_starts[documents + 1]
            yield np.stack([starts, stops], axis=1).clip(self.start, self.stop)


def split_by_document(tokens: SourceTokens, fraction: float, seed: int) -> list[SplitPlan]:
    """Hold out a seeded choice of ``max(1, round(fraction * documents))`` documents.

    The training documents come in a seeded random order, the held-out ones in source order. There
    must be at least two documents, unless `fraction` is 0.
    """
    count = tokens.num_documents
    # Raw bits of PCG64 are the same in every version of numpy; its permutations need not be.
    order = np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")
    held_out = min(max(1, round(fraction * count)), count - 1) if fraction > 0 else 0
    choices = {"train": order[held_out:], "validation": np.sort(order[:held_out])}
    sizes = np.diff(tokens.document_bytes)
    return [
        SplitPlan(name, chosen, 0, tokens.num_tokens, int(sizes[chosen].sum()))
        for name, chosen in choices.items()
        if len(chosen)
    ]


def split_by_position(
    tokens: SourceTokens, fraction: float, tokenizer: Tokenizer
) -> list[SplitPlan]:
    """Hold out the last ``max(1, round(fraction * tokens))`` tokens of the stream."""
    total = tokens.num_tokens
    held_out = min(max(1, round(fraction * total)), total - 1) if fraction > 0 else 0
    cut = total - held_out
    train_bytes = _bytes_before(tokens, cut, tokenizer)
    sides = {
        "train": (0, cut, train_bytes),
        "validation": (cut, total, int(tokens.document_bytes[-1]) - train_bytes),
    }
    plans = []
    for name, (start, stop, num_bytes) in sides.items():
        first = np.searchsorted(tokens.document_starts, start, side="right") - 1
        last = np.searchsorted(tokens.document_starts, stop)
        if start < stop:
            plans.append(SplitPlan(name, np.arange(first, last), start, stop, num_bytes))
    return plans


def _bytes_before(tokens: SourceTokens, cut: int, tokenizer: Tokenizer) -> int:
    """Text bytes of the tokens before `cut`.

    Exact for a lossless tokenizer; for another one, the error stays within one piece.
    """
    piece = int(np.searchsorted(tokens.piece_starts, cut)) - 1
    whole, end = tokens.piece_bytes[piece : piece + 2].tolist()
    begun = np.array([[tokens.piece_starts[piece], cut]])
    part = sum(len(tokenizer.decode_bytes(block)) for block in tokens.blocks(begun))
    return int(whole + min(part, end - whole))


def write_store(folder: Path, name: str, plans: list[SplitPlan], tokens: SourceTokens) -> None:
    """Write the files of the store `name` into a folder."""
    splits = {plan.name: _write_split(folder, plan, tokens) for plan in plans}
    meta = {"store": name, "dtype": tokens.dtype.str, "shard_bytes": SHARD_BYTES, "splits": splits}
    write_sealed(folder / META_FILE, json.dumps(meta, indent=2) + "\n")


def _write_split(folder: Path, plan: SplitPlan, tokens: SourceTokens) -> dict[str, Any]:
    whole = hashlib.sha256()
    blocks = (block for ranges in plan.ranges(tokens) for block in tokens.blocks(ranges))
    record: dict[str, Any] = {
        "tokens_sha256": _write_shards(folder, plan.name, "tokens", blocks, whole)
    }
    num_tokens, digest = 0, hashlib.sha256()
    with open(folder / f"{plan.name}.starts", "wb") as file:
        for ranges in plan.ranges(tokens):
            ends = num_tokens + np.cumsum(ranges[:, 1] - ranges[:, 0])
            starts = np.append(num_tokens, ends[:-1]).astype("<i8").tobytes()
            num_tokens = int(ends[-1])
            file.write(starts)
            digest.update(starts)
            whole.update(starts)
    if not tokens.piece_targets.all():
        blocks = (block for ranges in plan.ranges(tokens) for block in tokens.target_blocks(ranges))
        record["targets_sha256"] = _write_shards(folder, plan.name, "targets", blocks, whole)
    return record | {
        "tokens": num_tokens,
        "documents": len(plan.documents),
        "num_bytes": plan.num_bytes,
        "content_hash": whole.hexdigest(),
        "starts_sha256": digest.hexdigest(),
    }


def _write_shards(
    folder: Path, split: str, suffix: str, blocks: Iterable[np.ndarray], whole: "hashlib._Hash"
) -> list[str]:
    """Write blocks one after another, and hash them all; return the SHA-256 of each shard."""
    buffers, digests = _buffers(blocks), list[str]()
    with ThreadPoolExecutor(1) as thread:  # two hashes take longer than all else
        for buffer in buffers:
            digest = hashlib.sha256()
            with open(shard_path(folder, split, suffix, len(digests)), "wb") as file:
                others = itertools.islice(buffers, SHARD_BYTES // BUFFER_BYTES - 1)
                for data in itertools.chain([buffer], others):
                    hashed = thread.submit(digest.update, data)
                    whole.update(data)
                    file.write(data)
                    hashed.result()
            digests.append(digest.hexdigest())
    return digests


def _buffers(blocks: Iterable[np.ndarray]) -> Iterator[bytes]:
    """Join blocks, and cut them every `BUFFER_BYTES`."""
    buffer = bytearray()
    for block in blocks:
        buffer += block.data.cast("B")
        while len(buffer) >= BUFFER_BYTES:
            yield bytes(buffer[:BUFFER_BYTES])
            del buffer[:BUFFER_BYTES]
    if buffer:
        yield bytes(buffer)


@contextlib.contextmanager
def new_store(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Yield a folder for temporary files and one in it that becomes `folder` at the end.

    Raises:
      OSError: the disk is full or not writable.
    """
    temporary = Path(tempfile.mkdtemp(".tmp", f".{folder.name}.", folder.parent))
    try:
        result = temporary / "store"
        result.mkdir()
        yield temporary, result
        for path in [*result.iterdir(), result]:
            sync(path)
        try:
            os.rename(result, folder)
        except OSError as error:
            # Without file locks, another process can have been faster.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a store, which ends with the process; yield whether it is held.

    It is not held on a file system without locks, and if another process has it and `wait` is
    False.
    """
    path = folder.with_name(f".{folder.name}.lock")
    flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        with os.fdopen(os.open(path, flags, 0o644), "wb") as file:
            is_locked = _lock(file, folder, wait)
            if is_locked and not _is_at(file, path):
                continue  # whoever had the lock has removed the file
            try:
                yield is_locked
            finally:
                if is_locked:
                    path.unlink(missing_ok=True)
            return


def _lock(file: BinaryIO, folder: Path, wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if wait:
            logging.info("waiting for another process that writes %s", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        return wait
    except OSError:
        logging.info("no file locks on this file system: %s", folder)
        return False
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


def remove_abandoned(cache: Path) -> None:
    """Remove the temporary folders of writers that were killed."""
    for path in cache.glob(".*.tmp"):
        # Users may have hidden folders of their own there: only those of stores have such a name.
        name = _TEMPORARY.fullmatch(path.name)
        if name is None:
            continue
        with contextlib.suppress(OSError), locked(cache / name[1], wait=False) as is_locked:
            # Some network file systems have locks of one host only.
            newest = max(each.stat().st_mtime for each in (path, *path.rglob("*")))
            if is_locked and time.time() - newest > ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
