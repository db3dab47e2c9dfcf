"""Devices of this process: JAX's backend, its available memory, and a bound on its use."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from simplernn_jax.control_groups import memory_limits
from simplernn_jax.errors import UserError, format_bytes


def check_devices() -> None:
    """Start JAX's backend; raises `UserError` if JAX_PLATFORMS names one that is not available."""
    try:
        jax.devices()
    except Exception as error:  # jax raises AssertionError, KeyError, RuntimeError, ...
        chosen = os.environ.get("JAX_PLATFORMS", "")
        reason = str(error) or "its plugin is not installed"
        raise UserError(
            f"JAX finds no device (JAX_PLATFORMS={chosen!r}): {reason}; unset JAX_PLATFORMS, set "
            "it to cpu, or install its plugin (pip install -e '.[cuda]')"
        ) from error


def device_memory(device: jax.Device) -> int | None:
    """Return the bytes of memory available to arrays on `device`; None if unknown.

    On the CPU it is the memory of the machine or of this process's control group, shared by all
    simulated devices.
    """
    if device.platform == "cpu":
        return host_memory()
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit")


def host_memory() -> int | None:
    """Return the bytes of memory, swap included, available to this process; None if unknown."""
    return min([*_machine_memory(), *memory_limits()], default=None)


def check_memory(num_bytes: int, what: str, advice: str) -> None:
    """Raise `UserError`, ``WHAT ...; ADVICE``, for more bytes than half of the machine's memory."""
    total = host_memory()
    if total is not None and num_bytes > total // 2:
        raise UserError(
            f"{what}: needs {format_bytes(num_bytes)}, more than half of the {format_bytes(total)} "
            f"of memory of this machine; {advice}"
        )


def _machine_memory() -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = dict(line.split(":") for line in _lines("/proc/meminfo"))
        yield sum(int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal"))
        return
    with contextlib.suppress(OSError, ValueError):  # not Linux
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="ascii", errors="replace").splitlines()
