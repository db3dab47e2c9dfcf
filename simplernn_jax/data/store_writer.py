"""Writing of the shards and the manifest of a tokenized corpus (`store_folder`)."""

import functools
import hashlib
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from simplernn_jax.data.spool import SplitPlan, Spool
from simplernn_jax.data.store_folder import META_FILE, shard_path
from simplernn_jax.files import write_sealed

SHARD_BYTES = 1 << 28
"""Bytes of a shard, a multiple of the size of a token."""
BUFFER_BYTES = 1 << 20
"""Bytes that are collected before they are written."""


def write_store(folder: Path, name: str, plans: list[SplitPlan], spool: Spool) -> None:
    """Write the files of the store `name` into a folder, as far as they are not there already."""
    splits = {plan.name: _write_split(folder, plan, spool) for plan in plans}
    meta = {"store": name, "dtype": spool.dtype.str, "shard_bytes": SHARD_BYTES, "splits": splits}
    write_sealed(folder / META_FILE, json.dumps(meta, indent=2) + "\n")


def _write_split(folder: Path, plan: SplitPlan, spool: Spool) -> dict[str, Any]:
    whole = hashlib.sha256()
    num_tokens, starts_path = 0, folder / f"{plan.name}.starts"
    tokens = _ShardWriter(folder, plan.name, "tokens", whole)
    with tokens, open(starts_path, "wb") as starts:
        for ranges in plan.ranges(spool):
            ends = num_tokens + np.cumsum(ranges[:, 1] - ranges[:, 0])
            np.append(num_tokens, ends[:-1]).astype("<i8").tofile(starts)
            num_tokens = int(ends[-1])
            for block in spool.blocks(ranges):
                tokens.write(block)
    with open(starts_path, "rb") as starts:
        starts_sha256 = hashlib.file_digest(starts, "sha256").hexdigest()
        starts.seek(0)
        while data := starts.read(BUFFER_BYTES):
            whole.update(data)
    record = {}
    if not spool.piece_targets.all():
        with _ShardWriter(folder, plan.name, "targets", whole) as targets:
            for ranges in plan.ranges(spool):
                for block in spool.target_blocks(ranges):
                    targets.write(block)
        record["targets_sha256"] = targets.digests
    return record | {
        "tokens": num_tokens,
        "documents": len(plan.documents),
        "num_bytes": plan.num_bytes,
        "content_hash": whole.hexdigest(),
        "tokens_sha256": tokens.digests,
        "starts_sha256": starts_sha256,
    }


class _ShardWriter:
    """Writes shards one after another; bytes that a shard holds already are not written again."""

    def __init__(self, folder: Path, split: str, suffix: str, whole: "hashlib._Hash") -> None:
        self._path = functools.partial(shard_path, folder, split, suffix)
        self._whole = whole
        self._digest = hashlib.sha256()
        self._file: io.BufferedRandom | None = None
        self._thread = ThreadPoolExecutor(1)  # two hashes take longer than all else
        self._room = 0
        self._buffer = bytearray()
        self.digests: list[str] = []
        """SHA-256 of each shard."""

    def write(self, block: np.ndarray) -> None:
        """Append a block."""
        self._buffer += block.data.cast("B")
        if len(self._buffer) >= BUFFER_BYTES:
            self._flush()

    def __enter__(self) -> "_ShardWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._thread:
            if kind is None:
                self._flush()
        self._end_shard()

    def _flush(self) -> None:
        data = memoryview(bytes(self._buffer))
        self._buffer.clear()
        stored = self._thread.submit(self._store, data)
        self._whole.update(data)
        stored.result()

    def _store(self, data: memoryview) -> None:
        while data:
            if not self._room:
                self._end_shard()
                path = self._path(len(self.digests))
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                self._file = os.fdopen(descriptor, "r+b")
                self._room, self._digest = SHARD_BYTES, hashlib.sha256()
            part, data = data[: self._room], data[self._room :]
            self._room -= len(part)
            self._digest.update(part)
            self._put(part)

    def _put(self, part: memoryview) -> None:
        assert self._file is not None
        position = self._file.tell()
        if self._file.read(len(part)) != part:
            self._file.seek(position)
            self._file.write(part)

    def _end_shard(self) -> None:
        if self._file is None:
            return
        with self._file as file:
            file.flush()
            if os.fstat(file.fileno()).st_size != file.tell():
                file.truncate()
        self.digests.append(self._digest.hexdigest())
        self._file = None
