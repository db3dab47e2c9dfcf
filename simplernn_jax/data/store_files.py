"""The files of a token store: written once, fully verified before use.

NAME/train.tokens        token ids, unsigned; the first shard
NAME/train.00001.tokens  the next shard, and so on; all but the last of the same size
NAME/train.starts        positions of the first token of each document, int64
NAME/train.targets       whether each token is a target of the loss, bool, sharded like the tokens;
                         only if some are not
NAME/validation.*        the same, unless everything trains
NAME/meta.json           manifest: dtype, sizes and SHA-256 of these files, sealed (`files`)

Documents are stored in a seeded random order, which is known when all of them are counted. So the
tokens are first written to a temporary file in source order (`tokenization`), then to the shards.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simplernn_jax.data.token_split import TOKEN_DTYPES, ShardedArray, TokenSplit, joined
from simplernn_jax.data.tokenization import SourceTokens
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.files import check_damage, open_file, read_sealed, sha256_hex, sync, write_sealed

META_FILE = "meta.json"
"""Manifest of a store."""
SHARD_BYTES = 1 << 28
"""Bytes of a shard, a multiple of `BUFFER_BYTES`."""
BUFFER_BYTES = 1 << 20
"""Bytes that are written at a time, a multiple of the size of a token."""


class CorruptStore(Exception):
    """Name and fault of a file of a store that is not as it was written."""


class SplitPlan(NamedTuple):
    """One side of the split."""

    name: str
    ranges: np.ndarray
    """[documents, 2] int64, start and stop of each document in the source, in stored order."""
    num_bytes: int
    """UTF-8 bytes of its targets."""


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
    ranges, sizes = _document_ranges(tokens), np.diff(tokens.document_bytes)
    return [
        SplitPlan(name, ranges[chosen], int(sizes[chosen].sum()))
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
        ranges = _document_ranges(tokens).clip(start, stop)
        plans.append(SplitPlan(name, ranges[ranges[:, 0] < ranges[:, 1]], num_bytes))
    return [plan for plan in plans if len(plan.ranges)]


def _document_ranges(tokens: SourceTokens) -> np.ndarray:
    return np.stack([tokens.document_starts[:-1], tokens.document_starts[1:]], axis=1)


def _bytes_before(tokens: SourceTokens, cut: int, tokenizer: Tokenizer) -> int:
    """Text bytes of the tokens before `cut`.

    Exact for a lossless tokenizer; for another one, the error stays within one piece.
    """
    piece = int(np.searchsorted(tokens.piece_starts, cut)) - 1
    whole, end = tokens.piece_bytes[piece : piece + 2].tolist()
    begun = np.array([[tokens.piece_starts[piece], cut]])
    part = sum(len(tokenizer.decode_bytes(block)) for block in tokens.blocks(begun))
    return int(whole + min(part, end - whole))


@contextlib.contextmanager
def new_store(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Yield a folder for temporary files and one in it that becomes `folder` at the end.

    The caller has the lock of `folder`: what a writer that was killed has left is removed.

    Raises:
      OSError: the disk is full or not writable.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    result = temporary / "store"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        result.mkdir(parents=True)
        yield temporary, result
        for path in [*result.iterdir(), result]:
            sync(path)
        os.rename(result, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_store(folder: Path, name: str, plans: list[SplitPlan], tokens: SourceTokens) -> None:
    """Write the files of the store `name` into a folder."""
    splits = {plan.name: _write_split(folder, plan, tokens) for plan in plans}
    meta = {"store": name, "dtype": tokens.dtype.str, "shard_bytes": SHARD_BYTES, "splits": splits}
    write_sealed(folder / META_FILE, json.dumps(meta, indent=2) + "\n")


def _write_split(folder: Path, plan: SplitPlan, tokens: SourceTokens) -> dict[str, Any]:
    whole = hashlib.sha256()
    name, ranges = plan.name, plan.ranges
    record: dict[str, Any] = {
        "tokens_sha256": _write_shards(folder, name, "tokens", tokens.blocks(ranges), whole)
    }
    lengths = ranges[:, 1] - ranges[:, 0]
    starts = (np.cumsum(lengths) - lengths).astype("<i8").tobytes()
    (folder / f"{name}.starts").write_bytes(starts)
    whole.update(starts)
    if not tokens.piece_targets.all():
        blocks = tokens.target_blocks(ranges)
        record["targets_sha256"] = _write_shards(folder, name, "targets", blocks, whole)
    return record | {
        "tokens": int(lengths.sum()),
        "documents": len(ranges),
        "num_bytes": plan.num_bytes,
        "content_hash": whole.hexdigest(),
        "starts_sha256": sha256_hex(starts),
    }


def _write_shards(
    folder: Path, split: str, suffix: str, blocks: Iterable[np.ndarray], whole: "hashlib._Hash"
) -> list[str]:
    """Write blocks one after another, and hash them all; return the SHA-256 of each shard."""
    buffers, digests = _buffers(blocks), list[str]()
    with ThreadPoolExecutor(1) as thread:  # two hashes take longer than all else
        for buffer in buffers:
            digest = hashlib.sha256()
            with open(_shard_path(folder, split, suffix, len(digests)), "wb") as file:
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


def _shard_path(folder: Path, split: str, suffix: str, number: int) -> Path:
    return folder / (f"{split}.{number:05}.{suffix}" if number else f"{split}.{suffix}")


def open_store(folder: Path) -> list[TokenSplit]:
    """Verify every byte of a store and map its tokens; each core reads 1 to 2 GB a second.

    Raises:
      CorruptStore: a file is missing, not a regular file, or not what was written.
      OSError: it may not be read, or the machine has no memory or no file descriptor for it.
    """
    meta = _read_meta(folder)
    try:
        with ThreadPoolExecutor() as threads:
            return [_open_split(folder, name, meta, threads) for name in meta["splits"]]
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise CorruptStore(f"{META_FILE} is not the record of a store") from error


def content_hashes(folder: Path) -> list[str]:
    """Read the recorded content hashes of the splits; raises what `open_store` does."""
    return [split["content_hash"] for split in _read_meta(folder)["splits"].values()]


def _read_meta(folder: Path) -> dict[str, Any]:
    body = read_sealed(folder / META_FILE)
    if body is None:
        raise CorruptStore(f"{META_FILE} is missing or was changed")
    try:
        meta: dict[str, Any] = json.loads(body)
        is_valid = (
            meta["store"] == folder.name
            and meta["dtype"] in TOKEN_DTYPES
            and all(isinstance(split["content_hash"], str) for split in meta["splits"].values())
        )
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        is_valid = False
    if not is_valid:
        raise CorruptStore(f"{META_FILE} is not the record of this store")
    return meta


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
            path = _shard_path(folder, name, suffix, number)
            num_bytes = min(shard_bytes, size - number * shard_bytes)
            with _verified(path, num_bytes, digests[number]) as file:
                # Indexing the memmap class costs more than a plain array over the same memory.
                return np.asarray(np.memmap(file, dtype, "r"))

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
