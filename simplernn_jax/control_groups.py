"""Limits of this process's control group and of its parents, versions 1 and 2."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path


def memory_limits() -> Iterator[int]:
    """Yield limits of memory, in bytes."""
    for limit in _values("memory", "memory.max", ["memory.limit_in_bytes"]):
        if len(limit) == 1 and limit[0].isdecimal():  # not "max"
            yield int(limit[0])


def core_limits() -> Iterator[float]:
    """Yield limits of processor time, in cores."""
    for limit in _values("cpu", "cpu.max", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        is_set = len(limit) == 2 and all(map(str.isdecimal, limit))  # neither "max" nor -1
        if is_set and int(limit[1]):
            yield int(limit[0]) / int(limit[1])


def _values(controller: str, second: str, first: Sequence[str]) -> Iterator[list[str]]:
    """Yield the words of the files of a controller in each group, by version."""
    with contextlib.suppress(OSError, ValueError):
        for line in _text("/proc/self/cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            root, names = "/sys/fs/cgroup", [second]
            if controllers:
                root, names = f"{root}/{controller}", list(first)
                if controller not in controllers.split(","):
                    continue
            folder = Path(path.strip("/"))
            for group in (folder, *folder.parents):
                with contextlib.suppress(OSError):
                    yield " ".join(_text(str(Path(root, group, name))) for name in names).split()


def _text(path: str) -> str:
    return Path(path).read_text(encoding="ascii", errors="replace")
