"""Devices, memory and cores available to this process, and the end of its child processes.

JAX is imported where it is needed: processes that tokenize do without it.
"""

import contextlib
import ctypes
import math
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from simplernn_jax.errors import UserError, format_bytes

if TYPE_CHECKING:
    import jax


def check_devices() -> None:
    """Start JAX's backend; raises `UserError` if JAX_PLATFORMS names one that is not available."""
    import jax

    try:
        jax.devices()
    except Exception as error:  # jax raises AssertionError, KeyError, RuntimeError, ...
        chosen = os.environ.get("JAX_PLATFORMS", "")
        reason = str(error) or "its plugin is not installed"
        raise UserError(
            f"JAX finds no device (JAX_PLATFORMS={chosen!r}): {reason}; unset JAX_PLATFORMS, set "
            "it to cpu, or install its plugin (pip install -e '.[cuda]')"
        ) from error


def device_memory(device: "jax.Device") -> int | None:
    """Return the bytes of memory available to arrays on `device`; None if unknown.

    On the CPU it is the memory of the machine or of this process's control group, shared by all
    simulated devices.
    """
    if device.platform == "cpu":
        return host_memory()
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit")


def host_memory() -> int | None:
    """Return the bytes of memory available to this process; None if unknown."""
    limits = [int(words[0]) for words in _control_group("memory.max") if words[0] != "max"]
    with contextlib.suppress(OSError, ValueError):  # unknown names
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=None)


def check_memory(num_bytes: int, what: str, advice: str) -> None:
    """Raise `UserError`, ``WHAT ...; ADVICE``, for more bytes than half of the machine's memory."""
    total = host_memory()
    if total is not None and num_bytes > total // 2:
        raise UserError(
            f"{what}: needs {format_bytes(num_bytes)}, more than half of the {format_bytes(total)} "
            f"of memory of this machine; {advice}"
        )


def available_cores() -> int:
    """Return the number of cores this process may use, by its affinity and its control groups."""
    cores: list[float] = [os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        cores = [len(os.sched_getaffinity(0))]
    limits = [words for words in _control_group("cpu.max") if words[0] != "max"]
    return max(1, math.ceil(min(cores + [int(limit) / int(period) for limit, period in limits])))


def end_with_parent(parent: int) -> None:
    """Have Linux kill this process when its parent, of process id `parent`, has died."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(128 + signal.SIGKILL)


def _control_group(name: str) -> Iterator[list[str]]:
    """Yield the words of a file of each control group (version 2) of this process."""
    with contextlib.suppress(OSError):
        for line in _text("/proc/self/cgroup").splitlines():
            folder = Path(line.removeprefix("0::/"))
            for group in (folder, *folder.parents) if line.startswith("0::/") else ():
                with contextlib.suppress(OSError):
                    yield _text(str(Path("/sys/fs/cgroup", group, name))).split()


def _text(path: str) -> str:
    return Path(path).read_text(encoding="ascii", errors="replace")
