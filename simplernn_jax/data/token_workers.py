"""Processes that tokenize the parts of a corpus, one for each core.

A worker reads pickled parts from its standard input and answers each on its standard output. It is
no process of `multiprocessing`, which would import the caller's main module again. Nobody else can
write to these pipes, so unpickling what comes out of them is safe.
"""

import collections
import contextlib
import math
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from absl import logging

from simplernn_jax.data.documents import Corpus
from simplernn_jax.data.partial_folder import Interrupted
from simplernn_jax.data.token_parts import bad_records, has_part, write_part
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.data.tokenizer_loading import tokenizer_from_json
from simplernn_jax.devices import core_limits, end_with_parent
from simplernn_jax.errors import UserError

_MAX_WORKERS = 32
"""More than that wait for the process that reads and parses the text."""


class WorkerLost(Interrupted, UserError):
    """A process of this module died; the parts that are written stay valid."""


def available_cores() -> int:
    """Number of cores that this process may use, by its affinity and its control groups."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(1, math.ceil(min([cores, *core_limits()])))


def write_parts(
    folder: Path, corpus: Corpus, parts: Iterable[list[Any]], tokenizer: Tokenizer, num_workers: int
) -> int:
    """Tokenize the parts that `folder` lacks, in this process or in `num_workers` others.

    At most two parts for each worker are in memory.

    Returns:
      The number of all parts.

    Raises:
      UserError: a part cannot be read or encoded; `WorkerLost`: a process died.
      OSError: the disk is full or not writable.
    """
    count = 0
    running: collections.deque[tuple[int, Future[None]]] = collections.deque()

    def end_first() -> None:
        number, future = running.popleft()
        future.result()
        for problem in bad_records(folder, number):
            corpus.skip(problem)

    with _workers(folder, corpus, tokenizer, min(num_workers, _MAX_WORKERS)) as pool:
        for number, part in enumerate(parts):
            count += 1
            future: Future[None] = Future()
            if pool is not None and not has_part(folder, number):
                future = pool.submit(number, part)
            else:
                if pool is None and not has_part(folder, number):
                    write_part(folder, number, part, corpus, tokenizer)
                future.set_result(None)
            running.append((number, future))
            while len(running) > (1 if pool is None else pool.size + 1):
                end_first()
        while running:
            end_first()
    corpus.warn_of_skipped()
    return count


class _Pool:
    """Worker processes, each driven by a thread that waits for its answers."""

    def __init__(
        self, processes: list[subprocess.Popen[bytes]], corpus: Corpus, tokenizer: Tokenizer
    ) -> None:
        self.size = len(processes)
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        for process in processes:
            self._send(process, (corpus, tokenizer.to_json()))
        for process in processes:
            try:
                pickle.load(process.stdout)  # type: ignore[arg-type]  # noqa: S301
            except (EOFError, pickle.UnpicklingError) as error:
                raise OSError(f"{sys.executable} ended at its start") from error
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(self.size)

    def submit(self, number: int, part: list[Any]) -> "Future[None]":
        """Have a part written."""
        return self._threads.submit(self._write, number, part)

    def shut_down(self) -> None:
        """Wait for the parts that are being written, and drop the others."""
        self._threads.shutdown(cancel_futures=True)

    def _write(self, number: int, part: list[Any]) -> None:
        process = self._idle.get()
        try:
            self._send(process, (number, part))
            error = pickle.load(process.stdout)  # type: ignore[arg-type]  # noqa: S301
        except (EOFError, OSError, pickle.UnpicklingError) as problem:
            raise WorkerLost(
                f"a process that tokenizes died (exit code {process.wait()}), perhaps for lack of "
                "memory; run again, which continues with the parts that are left"
            ) from problem
        finally:
            self._idle.put(process)
        if isinstance(error, MemoryError):
            raise WorkerLost(
                f"tokenizing a part: {error or 'not enough memory'}; free some and run again, "
                "which continues with the parts that are left"
            )
        if error is not None:
            raise error

    @staticmethod
    def _send(process: subprocess.Popen[bytes], value: Any) -> None:
        pickle.dump(value, process.stdin, pickle.HIGHEST_PROTOCOL)  # type: ignore[arg-type]
        process.stdin.flush()  # type: ignore[union-attr]


@contextlib.contextmanager
def _workers(
    folder: Path, corpus: Corpus, tokenizer: Tokenizer, count: int
) -> Iterator[_Pool | None]:
    """Start and end worker processes; None if they are fewer than two or cannot be started."""
    processes: list[subprocess.Popen[bytes]] = []
    pool = None
    try:
        if count > 1:
            try:
                for _ in range(count):
                    processes.append(_start(folder))
                pool = _Pool(processes, corpus, tokenizer)
            except OSError as error:
                logging.warning("cannot start processes (%s); tokenizing in this one", error)
                for process in processes:
                    process.kill()
        yield pool
    except BaseException:
        # Or the parts that are being written would be waited for.
        for process in processes:
            process.kill()
        raise
    finally:
        if pool is not None:
            pool.shut_down()
        for process in processes:
            with contextlib.suppress(OSError), process:
                process.stdin.close()  # type: ignore[union-attr]


def _start(folder: Path) -> subprocess.Popen[bytes]:
    # An editable install leaves the name of its path hook in sys.path, which is no folder.
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(os.path.isabs, sys.path)])
    variables = {"PYTHONPATH": path, "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = f"from {__name__} import work; work()"
    return subprocess.Popen(
        # -P: nothing is imported from the current folder.
        [sys.executable, "-P", "-c", command, str(folder), str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **variables},
    )


def work() -> None:
    """Write the parts that the parent process sends."""
    folder, parent = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent ends us
    end_with_parent(int(parent))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    corpus, tokenizer_json = pickle.load(sys.stdin.buffer)  # noqa: S301
    tokenizer = tokenizer_from_json(tokenizer_json)
    pickle.dump(None, answers)  # it has started
    answers.flush()
    while True:
        try:
            number, part = pickle.load(sys.stdin.buffer)  # noqa: S301
        except EOFError:
            return
        error: Exception | None = None
        try:
            write_part(Path(folder), number, part, corpus, tokenizer)
        except (UserError, OSError, MemoryError) as problem:
            error = problem
        pickle.dump(error, answers)
        answers.flush()
