"""All tokens of a corpus in source order on disk, and what the split needs to know about them."""

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
"""What token ids are stored as, from the narrowest."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned dtype that holds every id."""
    return next(
        dtype for dtype in map(np.dtype, TOKEN_DTYPES) if vocab_size <= np.iinfo(dtype).max + 1
    )


@dataclasses.dataclass(frozen=True)
class Spool:
    """Tokens of all documents in one file, and where documents and pieces begin in it."""

    path: Path
    dtype: np.dtype
    document_starts: np.ndarray
    """[documents + 1] int64, the last one the number of tokens."""
    document_bytes: np.ndarray
    """[documents] int64, UTF-8 bytes of each document's text."""
    piece_starts: np.ndarray
    """[pieces] int64, position of each piece's first token."""
    piece_bytes: np.ndarray
    """[pieces] int64, UTF-8 bytes of each piece."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, BOS and EOS included."""
        return int(self.document_starts[-1])

    def blocks(self, ranges: np.ndarray) -> Iterator[np.ndarray]:
        """The tokens of [n, 2] ranges (start, stop), in this order, a bounded number at a time.

        Read rather than mapped: mapped pages count as memory of the process.
        """
        itemsize = self.dtype.itemsize
        with open(self.path, "rb", buffering=0) as stream:
            for start, stop in zip(ranges[:, 0].data, ranges[:, 1].data, strict=True):
                for position in range(start, stop, _BLOCK_TOKENS):
                    count = min(stop - position, _BLOCK_TOKENS)
                    data = os.pread(stream.fileno(), count * itemsize, position * itemsize)
                    yield np.frombuffer(data, self.dtype, count)


def write_spool(
    path: Path, corpus: Corpus, tokenizer: Tokenizer, on_progress: Callable[[int], None]
) -> Spool:
    """Tokenizes a corpus into one file, holding one piece of text at a time.

    A document without text is left out.

    Raises:
      UserError: the corpus cannot be read, or holds what the tokenizer does not know.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    bos, eos = (
        np.array([special], dtype).tobytes() for special in (tokenizer.bos_id, tokenizer.eos_id)
    )
    document_starts, document_bytes = array.array("q", [0]), array.array("q")
    piece_starts, piece_bytes = array.array("q"), array.array("q")
    position = 0
    with open(path, "wb") as stream:
        for document in corpus.documents():
            num_bytes = 0
            for piece in document.pieces:
                if not num_bytes:
                    stream.write(bos)
                    position += 1
                ids = tokenizer.encode(piece)
                stream.write(ids.astype(dtype).data)
                piece_starts.append(position)
                piece_bytes.append(len(piece) if piece.isascii() else len(piece.encode("utf-8")))
                num_bytes += piece_bytes[-1]
                position += len(ids)
                on_progress(corpus.bytes_read)
            if num_bytes:
                stream.write(eos)
                position += 1
                document_starts.append(position)
                document_bytes.append(num_bytes)
    columns = (document_starts, document_bytes, piece_starts, piece_bytes)
    return Spool(path, dtype, *(np.array(column, np.int64) for column in columns))
