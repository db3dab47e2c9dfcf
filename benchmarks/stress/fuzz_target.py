"""Process that gives inputs to the readers; see `fuzz`.

Its arguments are a folder, the number of inputs, the seed, and the id of its parent process.
"""

import atexit
import ctypes
import gc
import json
import random
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import atheris

# Before anything else imports the package: bytecode is instrumented when it is loaded.
with atheris.instrument_imports(include=["simplernn_jax"], enable_loader_override=False):
    from absl import logging

    from simplernn_jax.data.chat_template import TemplateError
    from simplernn_jax.devices import end_with_parent
    from simplernn_jax.errors import UserError
    from simplernn_jax.serving.requests import RequestError

    from ..measure import resident_bytes
    from .fuzz import OUTCOMES
    from .fuzz_data import Reader, data_readers
    from .fuzz_readers import run_readers
    from .mutation import mutated

_REJECTIONS = (UserError, RequestError, TemplateError)
_MAX_SECONDS, _HANGS_AFTER = 5.0, 300
"""CPU time of an input, and seconds after which libFuzzer ends this process, with the stacks."""
_MAX_GROWTH = 256
"""MiB that may be added after the first tenth of the inputs: libFuzzer keeps inputs that reach new
branches. A leak of 1 kB per input would add 900 MB in a full run."""
_MAX_BYTES = 1 << 16
_OURS = 0.8
"""Fraction of the mutations that `mutated` makes; libFuzzer makes the others."""
_SHOWN = 10_000


def _memory() -> float:
    """MiB in use, without what allocators keep: Arrow's keeps the pages of one large column."""
    gc.collect()
    if "pyarrow" in sys.modules:  # of an extra
        sys.modules["pyarrow"].default_memory_pool().release_unused()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
    return resident_bytes("self") / 2**20


def _read(reader: Reader, content: bytes) -> tuple[str, str | None]:
    """Give an input to a reader; return the kind of its outcome, and what is wrong."""
    start = time.process_time()
    kind, problem = "accepted", None
    try:
        reader.read(content)
    except _REJECTIONS as error:
        kind, problem = "rejected", None if str(error).strip() else "rejected without a reason"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # such as a panic of a library in Rust
        place = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"{error!r:.300} at {place.filename}:{place.lineno}"
    seconds = time.process_time() - start
    return kind, f"took {seconds:.1f} s" if seconds > _MAX_SECONDS and not problem else problem


def _mutate(data: bytes, max_size: int, seed: int) -> Any:
    """Mutate an input, except the byte that chooses the reader."""
    draw = random.Random(seed)
    if not data or draw.random() > _OURS:
        return data[:1] + atheris.Mutate(data[1:], max_size - 1)
    return (data[:1] + mutated(data[1:], draw))[:max_size]


def main(folder: Path, count: int, seed: int, parent: int) -> None:
    """Start from the examples of all readers; this does not return."""
    end_with_parent(parent)
    readers = [*data_readers(folder), *run_readers(folder)]
    corpus = folder / "inputs"
    corpus.mkdir()
    for number, reader in enumerate(readers):
        for index, example in enumerate(reader.examples):
            reader.read(example)  # or every input would be rejected
            (corpus / f"{number}_{index}").write_bytes(bytes([number]) + example)
    logging.set_verbosity(logging.FATAL)  # a warning for each input
    kinds: Counter[str] = Counter()
    failures: list[tuple[str, str]] = []
    before: list[float] = []

    def give(data: bytes) -> None:
        """Give an input, whose first byte chooses the reader; libFuzzer's first input has none."""
        number = kinds.total() + len(failures)
        if number == count // 10:
            before.append(_memory())
        reader, content = readers[(data or b"\0")[0] % len(readers)], data[1:]
        kind, problem = _read(reader, content)
        if problem is None:
            kinds[kind] += 1
        else:
            shown = f"{len(content):,} bytes {content[:_SHOWN]!r}"
            failures.append((f"input {number + 1}, {reader.name}, {shown}", problem))

    def write() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)  # libFuzzer's, which would kill a slow exit
        growth = _memory() - before[0] if before else 0.0
        if growth > _MAX_GROWTH:
            failures.append(("memory after all inputs", f"{growth:.0f} MiB more are in use"))
        (folder / OUTCOMES).write_text(json.dumps({"kinds": kinds, "failures": failures}))

    atexit.register(write)
    options = {"atheris_runs": count, "seed": seed + 1, "max_len": _MAX_BYTES, "len_control": 0}
    options |= {"timeout": _HANGS_AFTER, "rss_limit_mb": 0, "detect_leaks": 0}
    words = [f"-{name}={value}" for name, value in options.items()]
    words.append(f"-artifact_prefix={folder}/")
    atheris.Setup([sys.argv[0], *words, str(corpus)], give, custom_mutator=_mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
