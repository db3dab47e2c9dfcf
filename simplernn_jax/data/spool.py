"""Tokens of a corpus on disk in source order, and their split into training and validation."""

import array
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from simplernn_jax.data.documents import Corpus
from simplernn_jax.data.tokenizer import Tokenizer

_BLOCK_TOKENS = 1 << 20

TOKEN_DTYPES = ("|u1", "<u2", "<u4")
"""Dtypes of stored token ids, narrowest first."""


def token_dtype(vocab_size: int) -> np.dtype:
    """Smallest unsigned dtype that holds every id."""
    return next(
        dtype for dtype in map(np.dtype, TOKEN_DTYPES) if vocab_size <= np.iinfo(dtype).max + 1
    )


@dataclasses.dataclass(frozen=True)
class Spool:
    """Tokens of all documents in one file, with the offsets of documents and pieces."""

    path: Path
    dtype: np.dtype
    document_starts: np.ndarray
    """[documents + 1] int64, the last one the number of tokens."""
    document_bytes: np.ndarray
    """[documents] int64, UTF-8 bytes of each document's targets."""
    piece_starts: np.ndarray
    """[pieces] int64, position of each piece's first token."""
    piece_bytes: np.ndarray
    """[pieces] int64, UTF-8 bytes of each piece; 0 if it is no target."""
    piece_targets: np.ndarray
    """[pieces] bool, whether its tokens are targets of the loss."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, BOS and EOS included."""
        return int(self.document_starts[-1])

    def blocks(self, ranges: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the tokens of [n, 2] ranges (start, stop), in order, a bounded number at a time.

        Read rather than mapped: mapped pages count as memory of the process.
        """
        itemsize = self.dtype.itemsize
        with open(self.path, "rb", buffering=0) as stream:
            for start, stop in zip(ranges[:, 0].data, ranges[:, 1].data, strict=True):
                for position in range(start, stop, _BLOCK_TOKENS):
                    count = min(stop - position, _BLOCK_TOKENS)
                    data = os.pread(stream.fileno(), count * itemsize, position * itemsize)
                    yield np.frombuffer(data, self.dtype, count)

    def target_blocks(self, ranges: np.ndarray) -> Iterator[np.ndarray]:
        """Yield whether the tokens of `ranges` are targets, bool; the first of a range is none."""
        for start, stop in zip(ranges[:, 0].data, ranges[:, 1].data, strict=True):
            for position in range(start, stop, _BLOCK_TOKENS):
                positions = np.arange(position, min(stop, position + _BLOCK_TOKENS))
                # EOS belongs to the piece before it.
                piece = np.searchsorted(self.piece_starts, positions, side="right") - 1
                yield self.piece_targets[piece] & (positions > start)


def write_spool(
    path: Path, corpus: Corpus, tokenizer: Tokenizer, on_progress: Callable[[int], None]
) -> Spool:
    """Tokenize a corpus into one file, holding one piece of text at a time.

    A document without text is left out.

    Raises:
      UserError: the corpus cannot be read, or the tokenizer cannot encode it.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    bos, eos = (
        np.array([special], dtype).tobytes() for special in (tokenizer.bos_id, tokenizer.eos_id)
    )
    document_starts, document_bytes = array.array("q", [0]), array.array("q")
    piece_starts, piece_bytes, piece_targets = array.array("q"), array.array("q"), array.array("b")
    position = 0
    with open(path, "wb") as stream:
        for document in corpus.documents():
            num_bytes = 0
            for text, is_target in document.pieces:
                if position == document_starts[-1]:
                    stream.write(bos)
                    position += 1
                ids = tokenizer.encode(text)
                stream.write(ids.astype(dtype).data)
                piece_starts.append(position)
                size = len(text) if text.isascii() else len(text.encode("utf-8"))
                piece_bytes.append(size if is_target else 0)
                piece_targets.append(is_target)
                num_bytes += piece_bytes[-1]
                position += len(ids)
                on_progress(corpus.bytes_read)
            if position > document_starts[-1]:
                stream.write(eos)
                position += 1
                document_starts.append(position)
                document_bytes.append(num_bytes)
    return Spool(
        path,
        dtype,
        document_starts=np.array(document_starts, np.int64),
        document_bytes=np.array(document_bytes, np.int64),
        piece_starts=np.array(piece_starts, np.int64),
        piece_bytes=np.array(piece_bytes, np.int64),
        piece_targets=np.array(piece_targets, np.bool_),
    )


@dataclasses.dataclass(frozen=True)
class SplitPlan:
    """One side of the split."""

    name: str
    ranges: np.ndarray
    """[documents, 2] int64, start and stop in the spool, in stored order."""
    num_bytes: int
    """UTF-8 bytes of its targets."""

    @property
    def document_starts(self) -> np.ndarray:
        """[documents] int64, position of each document's first token once stored."""
        lengths = self.ranges[:, 1] - self.ranges[:, 0]
        return np.cumsum(lengths) - lengths


def split_by_document(spool: Spool, fraction: float, seed: int) -> list[SplitPlan]:
    """Hold out a seeded choice of ``max(1, round(fraction * documents))`` documents.

    The training documents come in a seeded random order, the held-out ones in source order. There
    must be at least two documents, unless `fraction` is 0.
    """
    ranges = _document_ranges(spool)
    count = len(ranges)
    # Raw bits of PCG64 are the same in every version of numpy; its permutations need not be.
    order = np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")
    held_out = min(max(1, round(fraction * count)), count - 1) if fraction > 0 else 0
    choices = {"train": order[held_out:], "validation": np.sort(order[:held_out])}
    return [
        SplitPlan(name, ranges[chosen], int(spool.document_bytes[chosen].sum()))
        for name, chosen in choices.items()
        if len(chosen)
    ]


def split_by_position(spool: Spool, fraction: float, tokenizer: Tokenizer) -> list[SplitPlan]:
    """Hold out the last ``max(1, round(fraction * tokens))`` tokens of the stream."""
    total = spool.num_tokens
    held_out = min(max(1, round(fraction * total)), total - 1) if fraction > 0 else 0
    cut = total - held_out
    ranges = _document_ranges(spool)
    train_bytes = _bytes_before(spool, cut, tokenizer)
    sides = {
        "train": (np.minimum(ranges, cut), train_bytes),
        "validation": (np.maximum(ranges, cut), int(spool.document_bytes.sum()) - train_bytes),
    }
    plans = []
    for name, (clipped, num_bytes) in sides.items():
        kept = clipped[clipped[:, 0] < clipped[:, 1]]
        if len(kept):
            plans.append(SplitPlan(name, kept, num_bytes))
    return plans


def _document_ranges(spool: Spool) -> np.ndarray:
    return np.stack([spool.document_starts[:-1], spool.document_starts[1:]], axis=1)


def _bytes_before(spool: Spool, cut: int, tokenizer: Tokenizer) -> int:
    """Text bytes of the tokens before `cut`.

    Exact for a lossless tokenizer; for another one, the error stays within one piece.
    """
    piece = int(np.searchsorted(spool.piece_starts, cut)) - 1
    if piece < 0:
        return 0
    whole = int(spool.piece_bytes[:piece].sum())
    begun = np.array([[spool.piece_starts[piece], cut]])
    part = sum(len(tokenizer.decode_bytes(block)) for block in spool.blocks(begun))
    return whole + min(part, int(spool.piece_bytes[piece]))
