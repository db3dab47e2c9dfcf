"""Small text files that end in the SHA-256 of their content, so that damage to them shows."""

import os

from simplernn_jax.files import read_file, sha256_hex, write_file


def write_sealed(path: str | os.PathLike[str], body: str) -> None:
    """Replace the file at `path` by `body` and a line with its SHA-256, atomically and durably.

    `body` ends in a newline or is empty.

    Raises:
      OSError: as `write_file`.
    """
    write_file(path, f"{body}{sha256_hex(body)}\n".encode())


def read_sealed(path: str | os.PathLike[str]) -> str | None:
    """Read the body that `write_sealed` wrote; None if the file is missing or was changed."""
    try:
        text = read_file(path).decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    body = text[: max(len(text) - 65, 0)]
    return body if text == f"{body}{sha256_hex(body)}\n" else None
