"""The files of one tokenized corpus: written once, fully verified before use.

NAME/train.tokens        token ids, unsigned; the first shard
NAME/train.00001.tokens  the next shard, and so on; all but the last of the same size
NAME/train.starts        positions of the first token of each document, int64
NAME/train.targets       whether each token is a target of the loss, bool, sharded like the tokens;
                         only if some are not
NAME/validation.*        the same, unless everything trains
NAME/meta.json           manifest: dtype, sizes and SHA-256 of these files, sealed (`files`)
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from simplernn_jax.data.sharded_array import ShardedArray, joined, shards_of
from simplernn_jax.data.token_parts import TOKEN_DTYPES
from simplernn_jax.data.token_workers import available_cores
from simplernn_jax.files import check_damage, open_file, read_sealed

META_FILE = "meta.json"
"""Manifest of a store."""
MIXTURE_SUFFIX = ".mixture.json"
"""Suffix of a file, beside stores, that names those of a mixture."""


class DamagedStore(Exception):
    """Name and fault of a file of a store that is not as it was written."""


@dataclasses.dataclass(frozen=True)
class TokenSplit:
    """One side of the split: consecutive documents, each BOS, its tokens, EOS."""

    name: str
    """``train`` or ``validation``."""
    tokens: np.ndarray | ShardedArray
    """[N] memory-mapped ids, the smallest unsigned dtype that holds the vocabulary."""
    document_starts: np.ndarray
    """[documents] int64, position of the first token of each document. A position split cuts one
    document: its rest begins the validation split at 0, without a BOS."""
    num_bytes: int
    """UTF-8 bytes of its targets."""
    content_hash: str
    """SHA-256 of the tokens, the document starts and the targets."""
    targets: np.ndarray | ShardedArray | None = None
    """[N] memory-mapped bool, whether a token is a target of the loss; None: all that follow
    another in their document."""

    @functools.cached_property
    def num_predictions(self) -> int:
        """Number of targets: tokens that follow another one in their document."""
        if self.targets is not None:
            return sum(int(np.count_nonzero(shard)) for shard in shards_of(self.targets))
        return len(self.tokens) - len(self.document_starts)


def shard_path(folder: Path, split: str, suffix: str, number: int) -> Path:
    """Path of a shard; `suffix` is ``tokens`` or ``targets``."""
    return folder / (f"{split}.{number:05}.{suffix}" if number else f"{split}.{suffix}")


def open_store(folder: Path) -> list[TokenSplit]:
    """Verify every byte of a store and map its tokens; each core reads 1 to 2 GB a second.

    Raises:
      DamagedStore: a file is missing, not a regular file, or not what was written.
      OSError: it may not be read, or the machine has no memory or no file descriptor for it.
    """
    meta = _read_meta(folder)
    with ThreadPoolExecutor(available_cores()) as threads:
        return [_open_split(folder, name, meta, threads) for name in meta["splits"]]


def is_store(folder: Path) -> bool:
    """Return whether a folder holds the manifest of a store of its name; reads no tokens."""
    try:
        return bool(_read_meta(folder))
    except (DamagedStore, OSError):
        return False


def content_hashes(folder: Path) -> list[str]:
    """Read the recorded content hashes of the splits; raises what `open_store` does."""
    return [split["content_hash"] for split in _read_meta(folder)["splits"].values()]


def remove_store(folder: Path) -> None:
    """Remove whatever is at the path of a store; a link, but not its target."""
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def _read_meta(folder: Path) -> dict[str, Any]:
    body = read_sealed(folder / META_FILE)
    if body is None:
        raise DamagedStore(f"{META_FILE} is missing or was changed")
    try:
        meta: dict[str, Any] = json.loads(body)
        if not all(_is_record(split) for split in meta["splits"].values()):
            raise TypeError
        store, dtype, shard_bytes = meta["store"], meta["dtype"], meta["shard_bytes"]
        if type(shard_bytes) is not int or shard_bytes < 1:
            raise TypeError
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise DamagedStore(f"{META_FILE} is not a record of a corpus") from error
    if store != folder.name:
        raise DamagedStore(f"{META_FILE} is that of another corpus")
    if dtype not in TOKEN_DTYPES:
        raise DamagedStore(f"{META_FILE} names the dtype {dtype}, which tokens never have")
    if shard_bytes % np.dtype(dtype).itemsize:
        raise DamagedStore(f"{META_FILE} has shards that end inside a token")
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
            raise DamagedStore(f"{META_FILE} does not list every shard")

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
                raise DamagedStore(f"{path.name} has {found:,} bytes instead of {size:,}")
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise DamagedStore(f"{path.name} was changed")
        except OSError as error:
            check_damage(error)
            raise DamagedStore(f"{path.name}: {error.strerror}") from error
        file.seek(0)
        yield file
