"""Globs whose work is bounded by the number of folders there are, whatever links they hold.

``glob.glob`` follows a link to a folder above it again and again: 40 times with one such link, and
2 to the power of 40 times with two.
"""

import collections
import fnmatch
import glob
import os
import stat
from collections.abc import Iterable, Iterator


def matching_files(pattern: str) -> list[str]:
    """Regular files that ``glob.glob(pattern, recursive=True)`` would find, in no certain order.

    Of several ways to a folder (through links), one is taken: below ``**`` the one without links.
    """
    folders = ["/" if pattern.startswith("/") else ""]
    *parts, last = pattern.split("/")
    for part in filter(None, parts):
        if part == "**":
            folders = _distinct(folders, recursive=True)
        elif glob.has_magic(part):
            folders = _distinct(path for folder in folders for path in _entries(folder, part))
        else:
            folders = [os.path.join(folder, part) for folder in folders]
    if last == "**":
        folders, last = _distinct(folders, recursive=True), "*"
    if glob.has_magic(last):
        found = [path for folder in folders for path in _entries(folder, last)]
    else:
        found = [os.path.join(folder, last) for folder in folders]
    return list(filter(os.path.isfile, found))


def _entries(folder: str, pattern: str) -> Iterator[str]:
    """Paths in a folder whose names match; hidden ones only if the pattern begins with a dot."""
    try:
        names = sorted(os.listdir(folder or "."))
    except OSError:
        return
    for name in fnmatch.filter(names, pattern):
        if not name.startswith(".") or pattern.startswith("."):
            yield os.path.join(folder, name)


def _distinct(paths: Iterable[str], *, recursive: bool = False) -> list[str]:
    """Those of `paths` that are folders, each folder once; with `recursive`, all below them too."""
    found: dict[tuple[int, int], str] = {}
    waiting, links = collections.deque(paths), collections.deque[str]()
    while waiting or links:
        path = (waiting or links).popleft()
        try:
            status = os.stat(path or ".")
        except OSError:
            continue
        identity = status.st_dev, status.st_ino
        if not stat.S_ISDIR(status.st_mode) or identity in found:
            continue
        found[identity] = path
        if recursive:
            for inner in _entries(path, "*"):
                (links if os.path.islink(inner) else waiting).append(inner)
    return list(found.values())
