"""Mutated input to everything that reads input, in this process."""

import faulthandler
import os
import random
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from absl import logging

from simplernn_jax.data.chat_template import TemplateError
from simplernn_jax.errors import UserError
from simplernn_jax.serving.requests import RequestError

from ..measure import resident_bytes
from .experiment import Case
from .mutation import mutated

REFUSALS = (UserError, RequestError, TemplateError)
MAX_SECONDS = 5.0
"""CPU time of an input; a chat template may use up 1 s in each of several renderings."""
HANGS_AFTER = 300
"""Seconds after which an input ends this process, with the stack of each thread."""
MAX_GROWTH = 128 * 2**20
"""Resident bytes that may be added after the first tenth of the inputs: the allocator's own
fragmentation adds tens of MiB. A leak of 1 kB per input would add 900 MB in a full run."""
_SHOWN = 300


class Reader(NamedTuple):
    """Something that reads input."""

    name: str
    examples: list[bytes]
    """Valid inputs."""
    read: Callable[[bytes], None]
    """Use the input; anything but a refusal is a defect, wrong results included."""
    weight: int = 4
    """How often it is chosen, beside others; 1 for a slow one."""


def fuzz(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Give mutated input to each of the readers."""
    from .fuzz_data import data_readers
    from .fuzz_requests import request_readers
    from .fuzz_runs import run_readers

    readers = [*data_readers(folder), *run_readers(folder), *request_readers(folder)]
    for reader in readers:
        for example in reader.examples:
            reader.read(example)  # or every input would be refused
    weights = [reader.weight for reader in readers]
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)  # a warning for each input
    warm_up, before = count // 10, 0.0
    try:
        for number in range(count):
            faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
            if number == warm_up:
                before = resident_bytes(os.getpid())
            draw = random.Random(f"{seed} {number}")
            (reader,) = draw.choices(readers, weights)
            content = mutated(draw.choice(reader.examples), draw)
            problem, kind = _read(reader, content)
            shown = f"{len(content):,} bytes {content[:_SHOWN]!r}"
            yield Case(f"input {number}, {reader.name}, {shown}", problem, kind)
    finally:
        faulthandler.cancel_dump_traceback_later()
        logging.set_verbosity(verbosity)
    growth = resident_bytes(os.getpid()) - before
    problem = None if growth <= MAX_GROWTH else f"{growth / 2**20:.0f} MiB more are in use"
    yield Case(f"memory after {count:,} inputs", problem)


def _read(reader: Reader, content: bytes) -> tuple[str | None, str]:
    """Give an input to a reader; return what is wrong, and the kind of its outcome."""
    start = time.process_time()
    try:
        reader.read(content)
        problem, kind = None, "accepted"
    except REFUSALS as error:
        problem, kind = None, "refused"
        if not str(error).strip():
            problem = "refused without a reason"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {str(error)[:_SHOWN]}"
        problem, kind = f"{reason} at {place.filename}:{place.lineno}", "failed"
    seconds = time.process_time() - start
    if problem is None and seconds > MAX_SECONDS:
        problem = f"took {seconds:.1f} s"
    return problem, kind
