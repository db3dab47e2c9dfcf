"""Tokens of a corpus on disk in source order, and their split into training and validation."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from simplernn_jax.data.documents import Corpus
from simplernn_jax.data.token_parts import cut_into_parts, part_path, read_pieces, token_dtype
from simplernn_jax.data.token_workers import write_parts
from simplernn_jax.data.tokenizer import Tokenizer

_BLOCK_TOKENS = 1 << 20
_OPEN_PARTS = 64
_RANGES = 1 << 16
"""Documents whose ranges are in memory at a time."""


@dataclasses.dataclass(frozen=True)
class Spool:
    """Tokens of all documents in parts, with the offsets of documents and pieces, memory-mapped."""

    folder: Path
    dtype: np.dtype
    part_starts: np.ndarray
    """[parts + 1] int64, position of each part's first token; the last one is the number of all."""
    document_starts: np.ndarray
    """[documents + 1] int64, the last one the number of tokens."""
    document_bytes: np.ndarray
    """[documents + 1] int64, UTF-8 bytes of the targets of all documents before."""
    piece_starts: np.ndarray
    """[pieces] int64, position of each piece's first token."""
    piece_bytes: np.ndarray
    """[pieces + 1] int64, UTF-8 bytes of all pieces before that are targets."""
    piece_targets: np.ndarray
    """[pieces] bool, whether its tokens are targets of the loss."""

    @property
    def num_documents(self) -> int:
        """Documents that have text."""
        return len(self.document_starts) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, BOS and EOS included."""
        return int(self.document_starts[-1])

    def blocks(self, ranges: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the tokens of [n, 2] ranges (start, stop), in order, a bounded number at a time.

        Read rather than mapped: mapped pages count as memory of the process.
        """
        itemsize = self.dtype.itemsize
        parts = np.searchsorted(self.part_starts, ranges[:, 0], side="right") - 1
        with _OpenParts(self.folder) as open_parts:
            for position, stop, part in zip(*ranges.T.tolist(), parts.tolist(), strict=True):
                while position < stop:
                    start, end = self.part_starts[part : part + 2].tolist()
                    count = min(stop - position, end - position, _BLOCK_TOKENS)
                    offset = (position - start) * itemsize
                    data = os.pread(open_parts[part], count * itemsize, offset)
                    if count:  # a part can be empty
                        yield np.frombuffer(data, self.dtype, count)
                    position += count
                    part += position == end

    def target_blocks(self, ranges: np.ndarray) -> Iterator[np.ndarray]:
        """Yield whether the tokens of `ranges` are targets, bool; the first of a range is none."""
        for start, stop in zip(ranges[:, 0].data, ranges[:, 1].data, strict=True):
            for position in range(start, stop, _BLOCK_TOKENS):
                positions = np.arange(position, min(stop, position + _BLOCK_TOKENS))
                # EOS belongs to the piece before it.
                piece = np.searchsorted(self.piece_starts, positions, side="right") - 1
                yield self.piece_targets[piece] & (positions > start)


class _OpenParts(dict[int, int]):
    """File descriptors of the parts that were read last."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, part: int) -> int:
        if len(self) >= _OPEN_PARTS:
            os.close(self.pop(next(iter(self))))
        self[part] = os.open(part_path(self._folder, part, "tokens"), os.O_RDONLY | os.O_CLOEXEC)
        return self[part]

    def __enter__(self) -> "_OpenParts":
        return self

    def __exit__(self, *_: object) -> None:
        while self:
            os.close(self.popitem()[1])


def write_spool(
    folder: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    on_progress: Callable[[int], None],
    num_workers: int = 1,
) -> Spool:
    """Tokenize a corpus into a folder, except for the parts that it holds already.

    A document without text is left out. The files are the same for every number of workers.

    Raises:
      UserError: the corpus cannot be read, or the tokenizer cannot encode it.
      OSError: the disk is full or not writable.
    """
    folder.mkdir(exist_ok=True)
    parts = cut_into_parts(corpus, on_progress)
    count = write_parts(folder, corpus, parts, tokenizer, num_workers)
    return _open_spool(folder, count, token_dtype(tokenizer.vocab_size))


_TABLES = {
    "document_starts": np.dtype("<i8"),
    "document_bytes": np.dtype("<i8"),
    "piece_starts": np.dtype("<i8"),
    "piece_bytes": np.dtype("<i8"),
    "piece_targets": np.dtype(np.bool_),
}


def _open_spool(folder: Path, count: int, dtype: np.dtype) -> Spool:
    """Join the tables of the parts, one after another."""
    part_starts, num_bytes = [0], 0
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in _TABLES}
        for number in range(count):
            pieces = read_pieces(folder, number)
            lengths = pieces.begins + pieces.tokens + pieces.ends
            starts = part_starts[-1] + np.cumsum(lengths) - lengths
            bytes_before = num_bytes + np.cumsum(pieces.num_bytes) - pieces.num_bytes
            begins = pieces.begins.astype(np.bool_)
            starts[begins].tofile(files["document_starts"])
            bytes_before[begins].tofile(files["document_bytes"])
            (starts + pieces.begins).tofile(files["piece_starts"])
            bytes_before.tofile(files["piece_bytes"])
            pieces.is_target.astype(np.bool_).tofile(files["piece_targets"])
            part_starts.append(part_starts[-1] + int(lengths.sum()))
            num_bytes += int(pieces.num_bytes.sum())
        np.array(part_starts[-1:], "<i8").tofile(files["document_starts"])
        for name in ("document_bytes", "piece_bytes"):
            np.array([num_bytes], "<i8").tofile(files[name])
    # Plain arrays over the same memory: indexing the memmap class costs more.
    tables = {
        name: np.asarray(np.memmap(path, table, "r"))
        if (path := folder / name).stat().st_size
        else np.empty(0, table)
        for name, table in _TABLES.items()
    }
    return Spool(folder, dtype, np.array(part_starts, np.int64), **tables)


@dataclasses.dataclass(frozen=True)
class SplitPlan:
    """One side of the split."""

    name: str
    documents: np.ndarray
    """[documents] int64, in stored order."""
    start: int
    """Position in the spool before which it has no token."""
    stop: int
    """Position in the spool from which on it has no token."""
    num_bytes: int
    """UTF-8 bytes of its targets."""

    def ranges(self, spool: Spool) -> Iterator[np.ndarray]:
        """Yield int64 [n, 2], start and stop of each document, a bounded number at a time."""
        for first in range(0, len(self.documents), _RANGES):
            documents = self.documents[first : first + _RANGES]
            starts, stops = spool.document_starts[documents], spool.document_starts[documents + 1]
            yield np.stack([starts, stops], axis=1).clip(self.start, self.stop)


def split_by_document(spool: Spool, fraction: float, seed: int) -> list[SplitPlan]:
    """Hold out a seeded choice of ``max(1, round(fraction * documents))`` documents.

    The training documents come in a seeded random order, the held-out ones in source order. There
    must be at least two documents, unless `fraction` is 0.
    """
    count = spool.num_documents
    # Raw bits of PCG64 are the same in every version of numpy; its permutations need not be.
    order = np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")
    held_out = min(max(1, round(fraction * count)), count - 1) if fraction > 0 else 0
    choices = {"train": order[held_out:], "validation": np.sort(order[:held_out])}
    sizes = np.diff(spool.document_bytes)
    return [
        SplitPlan(name, chosen, 0, spool.num_tokens, int(sizes[chosen].sum()))
        for name, chosen in choices.items()
        if len(chosen)
    ]


def split_by_position(spool: Spool, fraction: float, tokenizer: Tokenizer) -> list[SplitPlan]:
    """Hold out the last ``max(1, round(fraction * tokens))`` tokens of the stream."""
    total = spool.num_tokens
    held_out = min(max(1, round(fraction * total)), total - 1) if fraction > 0 else 0
    cut = total - held_out
    train_bytes = _bytes_before(spool, cut, tokenizer)
    sides = {
        "train": (0, cut, train_bytes),
        "validation": (cut, total, int(spool.document_bytes[-1]) - train_bytes),
    }
    plans = []
    for name, (start, stop, num_bytes) in sides.items():
        first = np.searchsorted(spool.document_starts, start, side="right") - 1
        last = np.searchsorted(spool.document_starts, stop)
        if start < stop:
            plans.append(SplitPlan(name, np.arange(first, last), start, stop, num_bytes))
    return plans


def _bytes_before(spool: Spool, cut: int, tokenizer: Tokenizer) -> int:
    """Text bytes of the tokens before `cut`.

    Exact for a lossless tokenizer; for another one, the error stays within one piece.
    """
    piece = int(np.searchsorted(spool.piece_starts, cut)) - 1
    if piece < 0:
        return 0
    whole, end = spool.piece_bytes[piece : piece + 2].tolist()
    begun = np.array([[spool.piece_starts[piece], cut]])
    part = sum(len(tokenizer.decode_bytes(block)) for block in spool.blocks(begun))
    return int(whole + min(part, end - whole))
