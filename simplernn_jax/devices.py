"""The devices that JAX computes on: whether there are any, and how much memory they have."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from simplernn_jax.errors import UserError


def check_devices() -> None:
    """Start JAX's backend.

    Raises:
      UserError: the platform that JAX_PLATFORMS names is not there.
    """
    try:
        jax.devices()
    except Exception as error:  # jax raises AssertionError, KeyError, RuntimeError, ...
        chosen = os.environ.get("JAX_PLATFORMS", "")
        reason = str(error) or "its plugin is not installed"
        raise UserError(
            f"JAX finds no device (JAX_PLATFORMS={chosen!r}): {reason}; unset JAX_PLATFORMS, set "
            "it to cpu, or install what it names (pip install -e '.[cuda]')"
        ) from error


def device_memory(device: jax.Device) -> int | None:
    """Return bytes of memory that arrays on `device` can have at most; None if it does not say.

    On the CPU it is that of the machine or of this process's control group, and is shared by all
    simulated devices.
    """
    if device.platform == "cpu":
        return host_memory()
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit")


def host_memory() -> int | None:
    """Return bytes of memory, swap included, that this process can have at most, if known."""
    return min([*_machine_memory(), *_cgroup_limits()], default=None)


def _machine_memory() -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = dict(line.split(":") for line in _lines("/proc/meminfo"))
        yield sum(int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal"))
        return
    with contextlib.suppress(OSError, ValueError):  # not Linux
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_limits() -> Iterator[int]:
    """Limits of this process's control group and of those around it, versions 1 and 2."""
    with contextlib.suppress(OSError, ValueError):
        for line in _lines("/proc/self/cgroup"):
            _, controllers, path = line.split(":", 2)
            if not controllers:
                root, name = "/sys/fs/cgroup", "memory.max"
            elif "memory" in controllers.split(","):
                root, name = "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
            else:
                continue
            folder = Path(path.strip("/"))
            for group in (folder, *folder.parents):
                with contextlib.suppress(OSError):
                    limit = _lines(os.path.join(root, group, name))[0]
                    if limit.isdecimal():  # not "max"
                        yield int(limit)


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="ascii", errors="replace").splitlines()
