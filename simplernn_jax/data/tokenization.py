"""Tokenization of a corpus into a temporary file, by several processes if it is large.

The text is cut into parts, which follow from the text alone. Processes tokenize parts; this one
reads the text and writes the tokens, in order.
"""

import collections
import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from absl import logging

from simplernn_jax.data.documents import Corpus, MalformedRecord, Record
from simplernn_jax.data.infilling import present
from simplernn_jax.data.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    InfillingTokenizer,
    Tokenizer,
    tokenizer_from_json,
)
from simplernn_jax.devices import available_cores, end_with_parent
from simplernn_jax.errors import UserError, format_bytes

PART_CHARACTERS = 1 << 23
"""Characters of a part, or bytes of records, which a process holds in memory."""
_RECORD_CHARACTERS = 64
"""Added for each record, since short ones take more memory than their text."""
SECONDS_PER_LINE = 30
"""Time between lines of progress."""
_MAX_WORKERS = 32
"""More than that wait for the process that reads the text."""
_BLOCK_TOKENS = 1 << 20
# Nothing is imported from the current folder.
_ENVIRONMENT = {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
_PIECES = np.dtype(
    [("tokens", "<i4"), ("num_bytes", "<i4"), ("is_target", np.bool_), ("begins", np.bool_)]
)
"""A piece of text: its tokens, BOS and EOS included; its UTF-8 bytes, 0 if it is not a target; and
whether it is a target and begins a document."""


Part = tuple[bytes, np.ndarray, list[str]]
"""Tokens of consecutive pieces of text; the pieces, [n] of the dtype `_PIECES`; and the problems of
the malformed records between them."""


class SourceTokens:
    """Tokens of all documents that have text, in source order, in a file.

    Attributes:
      dtype: dtype of the token ids.
      documents: [documents, 2] int64, start and stop of each document.
      document_bytes: [documents] int64, UTF-8 bytes of its targets.
      piece_starts: [pieces + 1] int64, position of each piece's first token, BOS included; the last
        one is the number of tokens.
      piece_bytes: [pieces + 1] int64, UTF-8 bytes of all pieces before that are targets.
      piece_targets: [pieces] bool, whether its tokens are targets of the loss.
      fim_ids: ids of infilling, which are no targets.
    """

    def __init__(
        self, path: Path, dtype: np.dtype, pieces: np.ndarray, fim_ids: tuple[int, ...]
    ) -> None:
        self._path, self.dtype, self.fim_ids = path, dtype, fim_ids
        self.piece_starts = np.append(0, np.cumsum(pieces["tokens"], dtype=np.int64))
        self.piece_bytes = np.append(0, np.cumsum(pieces["num_bytes"], dtype=np.int64))
        self.piece_targets = pieces["is_target"]
        begins = np.append(np.flatnonzero(pieces["begins"]), len(pieces))
        starts = self.piece_starts[begins]
        self.documents = np.stack([starts[:-1], starts[1:]], axis=1)
        self.document_bytes = np.diff(self.piece_bytes[begins])

    def blocks(self, ranges: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the tokens of [n, 2] ranges (start, stop), in order, a bounded number at a time.

        Read rather than mapped: mapped pages count as memory of the process.
        """
        itemsize = self.dtype.itemsize
        with open(self._path, "rb") as file:
            for _, start, stop in _cut_ranges(ranges):
                data = os.pread(file.fileno(), (stop - start) * itemsize, start * itemsize)
                yield np.frombuffer(data, self.dtype)

    def target_blocks(self, ranges: np.ndarray) -> Iterator[np.ndarray]:
        """Yield whether the tokens of `ranges` are targets, bool; the first of a range is not."""
        cuts = zip(_cut_ranges(ranges), self.blocks(ranges), strict=True)
        for (first, start, stop), tokens in cuts:
            positions = np.arange(start, stop)
            piece = np.searchsorted(self.piece_starts, positions, side="right") - 1
            is_text = ~np.isin(tokens, self.fim_ids)
            yield self.piece_targets[piece] & (positions > first) & is_text


def _cut_ranges(ranges: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yield the start of each of [n, 2] ranges, and its parts of at most `_BLOCK_TOKENS`."""
    for first, end in zip(map(int, ranges[:, 0]), map(int, ranges[:, 1]), strict=True):
        for start in range(first, end, _BLOCK_TOKENS):
            yield first, start, min(end, start + _BLOCK_TOKENS)


def tokenize(path: Path, corpus: Corpus, tokenizer: Tokenizer, source: str) -> SourceTokens:
    """Tokenize a corpus into the file `path`; `source` is its name in the progress.

    A document without text is left out. The tokens are the same for every number of processes; at
    most two parts for each of them are in memory.

    Raises:
      UserError: the corpus cannot be read, the tokenizer cannot encode it, or a process died.
      OSError: the disk is full or not writable.
    """
    tables, total = [np.empty(0, _PIECES)], corpus.total_bytes
    start = latest = time.monotonic()
    logging.info("tokenizing %s: %s ...", source, format_bytes(total))
    with contextlib.closing(_parts(corpus, tokenizer)) as parts, open(path, "wb") as file:
        for tokens, pieces, malformed in parts:
            for problem in malformed:
                corpus.skip(problem)
            file.write(tokens)
            tables.append(pieces)
            now = time.monotonic()
            if now - latest >= SECONDS_PER_LINE:
                latest = now
                done = corpus.bytes_read / max(total, 1)
                left = (now - start) * (1 - done) / max(done, 1e-9)
                logging.info("tokenizing %s: %.0f %%, %.0f s left", source, 100 * done, left)
    logging.info("tokenizing %s: done in %.1f s", source, time.monotonic() - start)
    corpus.warn_of_skipped()
    fim_ids = tokenizer.fim_ids if corpus.fim else ()
    return SourceTokens(path, _token_dtype(tokenizer), np.concatenate(tables), fim_ids)


def _parts(corpus: Corpus, tokenizer: Tokenizer) -> Generator[Part, None, None]:
    """Tokenize the parts of a corpus in this process or in others; yield them in order."""
    # A process takes as long to start as several parts take as bytes or characters.
    base = tokenizer.base if isinstance(tokenizer, InfillingTokenizer) else tokenizer
    is_fast = isinstance(base, ByteTokenizer | CharTokenizer)
    num_parts = corpus.total_bytes // PART_CHARACTERS
    num_workers = min(available_cores(), num_parts // 8 if is_fast else num_parts, _MAX_WORKERS)
    texts = _cut(corpus)
    if num_workers < 2:
        yield from (_tokenized(corpus, tokenizer, records) for records in texts)
        return
    context = multiprocessing.get_context("spawn")
    arguments = os.getpid(), corpus, tokenizer.to_json()
    with ProcessPoolExecutor(num_workers, context, _start, arguments) as pool:
        running: collections.deque[Future[Part]] = collections.deque()
        try:
            for records in texts:
                with _spawning():
                    running.append(pool.submit(_run, records))
                if len(running) > num_workers + 1:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except (BrokenProcessPool, MemoryError) as error:
            raise UserError(
                "a process that tokenizes died or ran out of memory; free some and run again"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _cut(corpus: Corpus) -> Iterator[list[Record]]:
    """Cut a corpus into lists of its `Corpus.records`."""
    part: list[Record] = []
    size = 0
    for record, characters in corpus.records():
        part.append(record)
        size += characters + _RECORD_CHARACTERS
        if size >= PART_CHARACTERS:
            yield part
            part, size = [], 0
    if part:
        yield part


def _token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Smallest unsigned dtype that holds every id."""
    return np.min_scalar_type(tokenizer.vocab_size - 1).newbyteorder("<")


def _tokenized(corpus: Corpus, tokenizer: Tokenizer, records: list[Record]) -> Part:
    """Tokenize the `Corpus.records` of a part."""
    tokens, rows, malformed = [], [], []
    dtype = _token_dtype(tokenizer)
    bos, eos = (np.array([x], dtype).tobytes() for x in (tokenizer.bos_id, tokenizer.eos_id))
    for pieces in corpus.parse(records):
        if isinstance(pieces, MalformedRecord):
            malformed.append(str(pieces))
            continue
        for text, is_target, begins, ends in pieces:
            ids = present(tokenizer, text, *corpus.fim) if corpus.fim else tokenizer.encode(text)
            if corpus.fim and ends and len(ids) and ids[-1] == tokenizer.eos_id:
                ids = ids[:-1]  # it ends the document too
            data = ids.astype(dtype).tobytes()
            data = b"".join((bos if begins else b"", data, eos if ends else b""))
            size = len(text) if text.isascii() else len(text.encode("utf-8"))
            rows.append((len(data) // dtype.itemsize, size if is_target else 0, is_target, begins))
            tokens.append(data)
    return b"".join(tokens), np.array(rows, _PIECES), malformed


@contextlib.contextmanager
def _spawning() -> Iterator[None]:
    """Give processes that start `_ENVIRONMENT`, and keep them from importing the main module.

    A script without ``if __name__ == "__main__"`` would run again in each of them.
    """
    main, before = sys.modules["__main__"], {x: os.environ.get(x) for x in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


class _Process:
    """State of a process that tokenizes."""

    tokenized: Callable[[list[Record]], Part]


def _start(parent_id: int, corpus: Corpus, tokenizer_json: str) -> None:
    """Prepare a process that tokenizes."""
    end_with_parent(parent_id)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent ends us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = tokenizer_from_json(tokenizer_json)
    _Process.tokenized = functools.partial(_tokenized, corpus, tokenizer)


def _run(records: list[Record]) -> Part:
    return _Process.tokenized(records)
