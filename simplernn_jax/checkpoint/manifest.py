"""SHA-256 manifests: the exact content that a checkpoint folder must have.

A manifest lists every file of a folder with its size and SHA-256, and ends in a line with the
SHA-256 of the lines above it (`files.write_sealed`), which detects its own corruption.
"""

import hashlib
import os
from collections.abc import Collection

from simplernn_jax.files import check_damage, open_file, read_sealed, sync, write_sealed

MANIFEST_NAME = "manifest.sha256"


def write_manifest(folder: str) -> None:
    """Flush every file of `folder` to the disk, then add the manifest, atomically.

    When this returns, the folder survives a power failure.

    Raises:
      OSError: the disk is full or fails.
    """
    body = ""
    for name in _file_names(folder):
        path = os.path.join(folder, name)
        sync(path)
        size, digest = _read_digest(path)
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
    body = read_sealed(os.path.join(folder, MANIFEST_NAME))
    if body is None:
        return f"{MANIFEST_NAME} is missing or was changed"
    lines = [line.split(" ", 2) for line in body.splitlines()]
    expected = {name: (int(size), digest) for digest, size, name in lines}
    for name in sorted(expected.keys() ^ set(_file_names(folder))):
        return f"{name} is missing" if name in expected else f"{name} does not belong there"
    for name, (size, digest) in expected.items():
        path = os.path.join(folder, name)
        is_read = parts is None or name.split(os.sep)[0] in parts
        try:
            if os.path.getsize(path) != size:
                return f"{name} has {os.path.getsize(path)} bytes instead of {size}"
            if is_read and _read_digest(path) != (size, digest):
                return f"{name} was changed"
        except OSError as error:
            check_damage(error)
            return f"{name} cannot be read ({error.strerror})"
    return None


def _file_names(folder: str) -> list[str]:
    """List all files below `folder` except the manifest, relative and sorted."""
    names = [
        os.path.relpath(os.path.join(parent, file), folder)
        for parent, _, files in os.walk(folder, onerror=check_damage)
        for file in files
    ]
    return sorted(name for name in names if name != MANIFEST_NAME)


def _read_digest(path: str) -> tuple[int, str]:
    """Return the size and the SHA-256 of a regular file."""
    with open_file(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest
