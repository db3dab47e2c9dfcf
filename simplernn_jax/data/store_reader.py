"""The files of a token store: written once, fully verified before use.

NAME/train.tokens        token ids, unsigned; the first shard
NAME/train.00001.tokens  the next shard, and so on; all but the last of the same size
NAME/train.starts        positions of the first token of each document, int64
NAME/train.targets       whether each token is a target of the loss, bool, sharded like the tokens;
                         only if some are not
NAME/validation.*        the same, unless everything trains
NAME/meta.json           manifest: dtype, sizes and SHA-256 of these files, sealed (`files`)
"""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from simplernn_jax.data.token_split import TOKEN_DTYPES, ShardedArray, TokenSplit, joined
from simplernn_jax.files import check_damage, open_file, read_sealed

META_FILE = "meta.json"
"""Manifest of a store."""


class CorruptStore(Exception):
    """Name and fault of a file of a store that is not as it was written."""


def shard_path(folder: Path, split: str, suffix: str, number: int) -> Path:
    """Path of a shard; `suffix` is ``tokens`` or ``targets``."""
    return folder / (f"{split}.{number:05}.{suffix}" if number else f"{split}.{suffix}")


def open_store(folder: Path) -> list[TokenSplit]:
    """Verify every byte of a store and map its tokens; each core reads 1 to 2 GB a second.

    Raises:
      CorruptStore: a file is missing, not a regular file, or not what was written.
      OSError: it may not be read, or the machine has no memory or no file descriptor for it.
    """
    meta = _read_meta(folder)
    with ThreadPoolExecutor() as threads:
        return [_open_split(folder, name, meta, threads) for name in meta["splits"]]


def is_store(folder: Path) -> bool:
    """Return whether a folder holds the manifest of a store of its name; reads no tokens."""
    try:
        return bool(_read_meta(folder))
    except (CorruptStore, OSError):
        return False


def content_hashes(folder: Path) -> list[str]:
    """Read the recorded content hashes of the splits; raises what `open_store` does."""
    return [split["content_hash"] for split in _read_meta(folder)["splits"].values()]


def _read_meta(folder: Path) -> dict[str, Any]:
    body = read_sealed(folder / META_FILE)
    if body is None:
        raise CorruptStore(f"{META_FILE} is missing or was changed")
    try:
        meta: dict[str, Any] = json.loads(body)
        dtype, shard_bytes = meta["dtype"], meta["shard_bytes"]
        is_valid = (
            all(map(_is_record, meta["splits"].values()))
            and (type(meta["store"]), type(shard_bytes)) == (str, int)
            and dtype in TOKEN_DTYPES
            and shard_bytes > 0 == shard_bytes % np.dtype(dtype).itemsize
        )
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        is_valid = False
    if not is_valid:
        raise CorruptStore(f"{META_FILE} is not a record of a corpus")
    if meta["store"] != folder.name:
        raise CorruptStore(f"{META_FILE} belongs to another corpus")
    return meta


def _is_record(split: dict[str, Any]) -> bool:
    """Return whether it has the fields of `write_store`; raises if one has another type."""
    counts = [split[name] for name in ("tokens", "documents", "num_bytes")]
    hashes = [split["content_hash"], split["starts_sha256"]]
    hashes += split["tokens_sha256"] + split.get("targets_sha256", [])
    return all(type(x) is int for x in counts) and all(type(x) is str for x in hashes)


def _open_split(
    folder: Path, name: str, meta: dict[str, Any], threads: ThreadPoolExecutor
) -> TokenSplit:
    split, dtype = meta["splits"][name], np.dtype(meta["dtype"])

    def open_shards(suffix: str, dtype: np.dtype) -> np.ndarray | ShardedArray:
        digests, size = split[f"{suffix}_sha256"], split["tokens"] * dtype.itemsize
        shard_bytes = meta["shard_bytes"]
        if len(digests) != -(-size // shard_bytes):
            raise CorruptStore(f"{META_FILE} does not list every shard")

        def open_shard(number: int) -> np.ndarray:
            path = shard_path(folder, name, suffix, number)
            num_bytes = min(shard_bytes, size - number * shard_bytes)
            with _verified(path, num_bytes, digests[number]) as file:
                return np.memmap(file, dtype, "r")

        return joined(list(threads.map(open_shard, range(len(digests)))))

    tokens = open_shards("tokens", dtype)
    path = folder / f"{name}.starts"
    with _verified(path, split["documents"] * 8, split["starts_sha256"]) as file:
        starts = np.fromfile(file, "<i8")
    targets = open_shards("targets", np.dtype(np.bool_)) if "targets_sha256" in split else None
    return TokenSplit(name, tokens, starts, split["num_bytes"], split["content_hash"], targets)


@contextlib.contextmanager
def _verified(path: Path, size: int, sha256: str) -> Iterator[io.BufferedReader]:
    """Open a file after checking its size and SHA-256."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open_file(path))
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise CorruptStore(f"{path.name} has {found:,} bytes instead of {size:,}")
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise CorruptStore(f"{path.name} was changed")
        except OSError as error:
            check_damage(error)
            raise CorruptStore(f"{path.name}: {error.strerror}") from error
        file.seek(0)
        yield file
