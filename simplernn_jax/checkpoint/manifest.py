"""SHA-256 manifests: the exact content that a checkpoint folder must have.

A manifest lists every file of a folder with its size and SHA-256, and ends in a line with the
SHA-256 of the lines above it (`files.write_sealed`), which detects its own corruption.
"""

import hashlib
import os
import re
import stat
from collections.abc import Collection

from simplernn_jax.files import check_damage, open_file, read_sealed, sync, write_sealed

MANIFEST_NAME = "manifest.sha256"

_LINE = re.compile(r"([0-9a-f]{64}) (\d{1,18}) (.+)")


def write_manifest(folder: str) -> None:
    """Flush every file of `folder` to the disk, then add the manifest, atomically.

    When this returns, the folder survives a power failure.

    Raises:
      OSError: the disk is full or fails.
    """
    body = ""
    for name in _file_names(folder):
        size, digest = _read_digest(os.path.join(folder, name), sync=True)
        body += f"{digest} {size} {name}\n"
    for parent, _, _ in os.walk(folder, topdown=False):
        sync(parent)
    write_sealed(os.path.join(folder, MANIFEST_NAME), body)


def find_corruption(folder: str, parts: Collection[str] | None = None) -> str | None:
    """Compare `folder` with its manifest: the names and sizes of all files, and every byte.

    With `parts`, only the bytes of files in these folders directly below `folder`.

    Returns:
      None if all is as written, else one phrase that names the first file that is not.

    Raises:
      OSError: a file may not be read, or the machine has no memory or file descriptor for it.
    """
    path = os.path.join(folder, MANIFEST_NAME)
    try:
        os.lstat(path)
    except OSError as error:
        check_damage(error)
        return f"{MANIFEST_NAME} is missing"
    body = read_sealed(path)
    if body is None:
        return f"{MANIFEST_NAME} was changed"
    expected = _parse(body)
    if expected is None:
        return f"{MANIFEST_NAME} is not a manifest"
    found = set(_file_names(folder))
    for name in sorted(expected.keys() ^ found):
        return f"{name} is missing" if name in expected else f"{name} does not belong there"
    for name, wanted in expected.items():
        is_read = parts is None or name.split(os.sep)[0] in parts
        defect = _file_corruption(os.path.join(folder, name), *wanted, is_read=is_read)
        if defect is not None:
            return f"{name} {defect}"
    return None


def _parse(body: str) -> dict[str, tuple[int, str]] | None:
    """Return size and SHA-256 by name; None if these are not the lines of a manifest."""
    expected = {}
    for line in body.splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            return None
        digest, size, name = match.groups()
        expected[name] = (int(size), digest)
    return expected


def _file_corruption(path: str, size: int, digest: str, *, is_read: bool) -> str | None:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return "is not a regular file"
        if status.st_size != size:
            return f"has {status.st_size} bytes instead of {size}"
        if is_read and _read_digest(path, sync=False) != (size, digest):
            return "was changed"
    except OSError as error:
        check_damage(error)
        return f"cannot be read ({error.strerror})"
    return None


def _file_names(folder: str) -> list[str]:
    """List all files below `folder` but the manifest, relative and sorted."""
    names = [
        os.path.relpath(os.path.join(parent, file), folder)
        for parent, _, files in os.walk(folder, onerror=check_damage)
        for file in files
    ]
    return sorted(name for name in names if name != MANIFEST_NAME)


def _read_digest(path: str, *, sync: bool) -> tuple[int, str]:
    """Return the size and the SHA-256 of a regular file, after flushing it if `sync`."""
    with open_file(path) as file:
        if sync:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest
