"""The most memory that a process, or a card, held while something ran; for a fresh process."""

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CLEAR_PEAK = "5"


class Peak(NamedTuple):
    """Bytes; None where the system does not say (a CPU without Linux's ``/proc``)."""

    over_start: float | None
    """The peak while it ran, less what was held before."""
    total: float | None
    """The peak with what was held before."""


def jax_peak(work: Callable[[], Any]) -> Peak:
    """Runs `work`, JAX that is compiled already, and waits for it.

    Resident memory of the process on a CPU; on a card what JAX allocated there since its start.
    """

    def wait() -> None:
        jax.block_until_ready(work())

    device = jax.local_devices()[0]
    before = device.memory_stats()
    if before is None:
        return process_peak(wait)
    wait()
    peak = device.memory_stats()["peak_bytes_in_use"]
    return Peak(peak - before["bytes_in_use"], peak)


def process_peak(work: Callable[[], Any]) -> Peak:
    """Runs `work` and watches the resident memory of this process."""
    if not _CLEAR.exists():
        work()
        return Peak(None, None)
    gc.collect()
    _give_back_freed_memory()
    _CLEAR.write_text(_CLEAR_PEAK, encoding="ascii")
    before = _resident("VmRSS")
    work()
    peak = _resident("VmHWM")
    return Peak(peak - before, peak)


def _give_back_freed_memory() -> None:
    """What compilation has left in the heap would otherwise be used again, unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def _resident(field: str) -> float:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{_STATUS} has no line {field}")
    return float(found[1]) * 1024
