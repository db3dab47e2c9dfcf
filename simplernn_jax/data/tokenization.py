"""Tokenization of a corpus into temporary files, by several processes if it is large.

The text is cut into parts, which follow from the text alone. Each process appends the tokens of its
parts to one file, and returns a table of their pieces.
"""

import collections
import contextlib
import dataclasses
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging

from simplernn_jax.data.documents import Corpus, MalformedRecord, Record
from simplernn_jax.data.token_split import token_dtype
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.data.tokenizer_loading import tokenizer_from_json
from simplernn_jax.devices import core_limits, end_with_parent
from simplernn_jax.errors import UserError

PART_CHARACTERS = 1 << 23
"""Characters of a part, or bytes of records, which a process holds in memory."""
_RECORD_CHARACTERS = 64
"""Added for each record, since short ones take more memory than their text."""
_MAX_WORKERS = 32
"""More than that wait for the process that reads the text."""
_BLOCK_TOKENS = 1 << 20
_ENVIRONMENT = {
    "PYTHONSAFEPATH": "1",  # nothing is imported from the current folder
    "PYTHONWARNINGS": "ignore",  # of semaphores, if a signal ends this process
    "RAYON_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}
"""Environment variables of the processes."""
_SPAWNING = threading.Lock()
_PIECES = np.dtype(
    [("tokens", "<i8"), ("num_bytes", "<i8"), ("is_target", np.bool_), ("begins", np.bool_)]
)
"""A piece of text: its tokens, BOS and EOS included; its UTF-8 bytes, 0 if it is not a target; and
whether it is a target and begins a document."""
_TABLES = {
    "document_starts": np.dtype("<i8"),
    "document_bytes": np.dtype("<i8"),
    "piece_starts": np.dtype("<i8"),
    "piece_bytes": np.dtype("<i8"),
    "piece_targets": np.dtype(np.bool_),
}


class Part(NamedTuple):
    """Consecutive pieces of text that were tokenized."""

    path: Path
    """File with the token ids of this and of other parts."""
    offset: int
    """Bytes of the file before the part."""
    pieces: np.ndarray
    """[pieces] of the dtype `_PIECES`."""
    malformed: list[str]
    """Problems of the malformed records."""


@dataclasses.dataclass(frozen=True)
class SourceTokens:
    """Tokens of all documents in source order, in files of several parts, memory-mapped tables."""

    dtype: np.dtype
    parts: list[tuple[Path, int]]
    """File and offset in bytes of each part."""
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
        first = np.searchsorted(self.part_starts, ranges[:, 0], side="right") - 1
        with contextlib.ExitStack() as stack:
            files = {path: stack.enter_context(open(path, "rb")).fileno() for path, _ in self.parts}
            for position, stop, part in zip(*ranges.T.tolist(), first.tolist(), strict=True):
                while position < stop:
                    start, end = self.part_starts[part : part + 2].tolist()
                    count = min(stop - position, end - position, _BLOCK_TOKENS)
                    path, offset = self.parts[part]
                    offset += (position - start) * itemsize
                    if count:  # a part can be empty
                        data = os.pread(files[path], count * itemsize, offset)
                        yield np.frombuffer(data, self.dtype, count)
                    position += count
                    part += position == end

    def target_blocks(self, ranges: np.ndarray) -> Iterator[np.ndarray]:
        """Yield whether the tokens of `ranges` are targets, bool; the first of a range is not."""
        for start, stop in zip(*ranges.T.tolist(), strict=True):
            for position in range(start, stop, _BLOCK_TOKENS):
                positions = np.arange(position, min(stop, position + _BLOCK_TOKENS))
                piece = np.searchsorted(self.piece_starts, positions, side="right") - 1
                yield self.piece_targets[piece] & (positions > start)


def available_cores() -> int:
    """Number of cores that this process may use, by its affinity and its control groups."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(1, math.ceil(min([cores, *core_limits()])))


def tokenize(
    folder: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    on_progress: Callable[[int], None],
    num_workers: int = 1,
) -> SourceTokens:
    """Tokenize a corpus into files in `folder`.

    A document without text is left out. The tokens are the same for every number of workers; at
    most two parts for each worker are in memory.

    Raises:
      UserError: the corpus cannot be read, the tokenizer cannot encode it, or a process died.
      OSError: the disk is full or not writable.
    """
    places, starts, num_bytes = [], [0], 0
    parts = _parts(folder, corpus, tokenizer, on_progress, num_workers)
    with contextlib.closing(parts), contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in _TABLES}
        for path, offset, pieces, malformed in parts:
            for problem in malformed:
                corpus.skip(problem)
            begins = pieces["begins"]
            piece_starts = starts[-1] + np.cumsum(pieces["tokens"]) - pieces["tokens"]
            piece_bytes = num_bytes + np.cumsum(pieces["num_bytes"]) - pieces["num_bytes"]
            piece_starts.tofile(files["piece_starts"])
            piece_bytes.tofile(files["piece_bytes"])
            pieces["is_target"].tofile(files["piece_targets"])
            piece_starts[begins].tofile(files["document_starts"])
            piece_bytes[begins].tofile(files["document_bytes"])
            places.append((path, offset))
            starts.append(starts[-1] + int(pieces["tokens"].sum()))
            num_bytes += int(pieces["num_bytes"].sum())
        ends = {
            "document_starts": starts[-1],
            "document_bytes": num_bytes,
            "piece_bytes": num_bytes,
        }
        for name, end in ends.items():
            np.array([end], "<i8").tofile(files[name])
    corpus.warn_of_skipped()
    # Plain arrays over the same memory: indexing the memmap class costs more.
    tables = {
        name: np.asarray(np.memmap(path, dtype, "r"))
        if (path := folder / name).stat().st_size
        else np.empty(0, dtype)
        for name, dtype in _TABLES.items()
    }
    dtype = token_dtype(tokenizer.vocab_size)
    return SourceTokens(dtype, places, np.array(starts, np.int64), **tables)


def _parts(
    folder: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    on_progress: Callable[[int], None],
    num_workers: int,
) -> Generator[Part, None, None]:
    """Tokenize the parts of a corpus in this process or in others; yield them in order."""
    texts = _cut(corpus, on_progress)
    num_workers = min(num_workers, _MAX_WORKERS)
    with _started(folder, corpus, tokenizer, num_workers) as pool:
        if pool is None:
            yield from map(_Tokenizer(folder, corpus, tokenizer), texts)
            return
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


def _cut(corpus: Corpus, on_progress: Callable[[int], None]) -> Iterator[list[Record]]:
    """Cut a corpus into lists of its `Corpus.records`."""
    part: list[Record] = []
    size = 0
    for record, characters in corpus.records():
        part.append(record)
        size += characters + _RECORD_CHARACTERS
        on_progress(corpus.bytes_read)
        if size >= PART_CHARACTERS:
            yield part
            part, size = [], 0
    if part:
        yield part


class _Tokenizer:
    """Tokenizes parts and appends their tokens to a file of this process."""

    def __init__(self, folder: Path, corpus: Corpus, tokenizer: Tokenizer) -> None:
        self._corpus, self._tokenizer = corpus, tokenizer
        self._path = folder / f"{os.getpid()}.tokens"

    def __call__(self, records: list[Record]) -> Part:
        """Tokenize the `Corpus.records` of a part."""
        tokenizer, rows, malformed = self._tokenizer, [], []
        dtype = token_dtype(tokenizer.vocab_size)
        bos, eos = (np.array([x], dtype).tobytes() for x in (tokenizer.bos_id, tokenizer.eos_id))
        with open(self._path, "ab") as file:
            offset = file.tell()
            for pieces in self._corpus.parse(records):
                if isinstance(pieces, MalformedRecord):
                    malformed.append(str(pieces))
                    continue
                for text, is_target, begins, ends in pieces:
                    data = tokenizer.encode(text).astype(dtype).tobytes()
                    data = b"".join((bos if begins else b"", data, eos if ends else b""))
                    size = len(text) if text.isascii() else len(text.encode("utf-8"))
                    count = len(data) // dtype.itemsize
                    rows.append((count, size if is_target else 0, is_target, begins))
                    file.write(data)
        return Part(self._path, offset, np.array(rows, _PIECES), malformed)


@contextlib.contextmanager
def _started(
    folder: Path, corpus: Corpus, tokenizer: Tokenizer, count: int
) -> Iterator[ProcessPoolExecutor | None]:
    """Start processes and end them; None if they are fewer than two or cannot be started."""
    if count < 2 or multiprocessing.current_process().daemon:  # which may not start processes
        yield None
        return
    context = multiprocessing.get_context("spawn")
    # When this process closes its end, or ends itself, the others end.
    alive, end = context.Pipe(duplex=False)
    arguments = folder, corpus, tokenizer.to_json()
    with alive, end, contextlib.ExitStack() as stack:
        try:
            with _spawning():
                pool = stack.enter_context(
                    ProcessPoolExecutor(count, context, _start, (os.getpid(), alive, *arguments))
                )
                started = [pool.submit(time.sleep, 0.01) for _ in range(count)]
            for each in started:
                each.result()
        except (OSError, BrokenProcessPool) as error:
            logging.warning("cannot start processes (%s); tokenizing in this one", error)
            pool = None
        try:
            yield pool
        except BaseException:
            end.close()  # or the parts that are being tokenized would be waited for
            raise


@contextlib.contextmanager
def _spawning() -> Iterator[None]:
    """Set the environment of processes that start, and keep them from importing the main module.

    A script without ``if __name__ == "__main__"`` would run again in each of them.
    """
    with _SPAWNING:
        main = sys.modules["__main__"]
        before = {name: os.environ.get(name) for name in _ENVIRONMENT}
        sys.modules["__main__"] = types.ModuleType("__main__")
        os.environ.update(_ENVIRONMENT)
        try:
            yield
        finally:
            sys.modules["__main__"] = main
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


class _Process:
    """State of a process that tokenizes."""

    tokenizer: _Tokenizer


def _start(
    parent_id: int, parent: Connection, folder: Path, corpus: Corpus, tokenizer_json: str
) -> None:
    """Prepare a process that tokenizes."""
    end_with_parent(parent_id)  # also while a library holds the GIL
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent ends us
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _Process.tokenizer = _Tokenizer(folder, corpus, tokenizer_from_json(tokenizer_json))


def _end_with(parent: Connection) -> None:
    with contextlib.suppress(OSError):
        parent.poll(None)
    os._exit(1)


def _run(records: list[Record]) -> Part:
    return _Process.tokenizer(records)
