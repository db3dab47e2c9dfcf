"""SHA-256 manifests: what a checkpoint folder must contain, to the last bit.

A manifest lists every file of a folder with its size and SHA-256, and ends in a line with the
SHA-256 of the lines above it (`sealed_file`), so that damage to the manifest itself shows as well.
"""

import hashlib
import os
from collections.abc import Collection

from simplernn_jax.files import sync
from simplernn_jax.sealed_file import read_sealed, write_sealed

MANIFEST_NAME = "manifest.sha256"


def write_manifest(folder: str) -> None:
    """Brings every file of `folder` to the disk, then adds the manifest, atomically.

    Until this returns, the folder counts as unfinished; once it has, nothing of the folder is
    lost in a power failure.

    Raises:
      OSError: the disk is full or does not answer.
    """
    body = ""
    for name in _file_names(folder):
        size, digest = _read_digest(os.path.join(folder, name), sync=True)
        body += f"{digest} {size} {name}\n"
    for parent, _, _ in os.walk(folder, topdown=False):
        sync(parent)
    write_sealed(os.path.join(folder, MANIFEST_NAME), body)


def has_manifest(folder: str) -> bool:
    """Whether a manifest is there at all, whole or not."""
    return os.path.lexists(os.path.join(folder, MANIFEST_NAME))


def find_damage(folder: str, parts: Collection[str] | None = None) -> str | None:
    """Compares `folder` with its manifest: the names and sizes of all files, and every byte.

    With `parts`, only the bytes of files in these folders directly below `folder`.

    Returns:
      None if all is as written, else one phrase that names the first file that is not.
    """
    if not has_manifest(folder):
        return f"{MANIFEST_NAME} is missing"
    body = read_sealed(os.path.join(folder, MANIFEST_NAME))
    if body is None:
        return f"{MANIFEST_NAME} was changed"
    expected = {}
    for line in body.splitlines():
        digest, size_text, name = line.split(" ", 2)
        expected[name] = (int(size_text), digest)
    found = set(_file_names(folder))
    for name in sorted(expected.keys() - found):
        return f"{name} is missing"
    for name in sorted(found - expected.keys()):
        return f"{name} does not belong there"
    for name, (size, digest) in expected.items():
        path = os.path.join(folder, name)
        try:
            if os.path.getsize(path) != size:
                return f"{name} has {os.path.getsize(path)} bytes instead of {size}"
            is_wanted = parts is None or name.split(os.sep)[0] in parts
            if is_wanted and _read_digest(path, sync=False) != (size, digest):
                return f"{name} was changed"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _file_names(folder: str) -> list[str]:
    """All files below `folder` but the manifest, relative and sorted."""
    names = [
        os.path.relpath(os.path.join(parent, file), folder)
        for parent, _, files in os.walk(folder)
        for file in files
    ]
    return sorted(name for name in names if name != MANIFEST_NAME)


def _read_digest(path: str, *, sync: bool) -> tuple[int, str]:
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256")
        return file.tell(), digest.hexdigest()
