"""Small text files that end in the SHA-256 of what they say, so that damage to them shows."""

import hashlib
import os

from simplernn_jax.files import read_file, write_file


def write_sealed(path: str | os.PathLike[str], body: str) -> None:
    """Replace the file at `path` by `body` and a line with its SHA-256, atomically and durably.

    `body` ends in a newline or is empty.

    Raises:
      OSError: as `write_file`.
    """
    write_file(path, f"{body}{_digest(body)}\n".encode())


def read_sealed(path: str | os.PathLike[str]) -> str | None:
    """Read the body that `write_sealed` wrote; None if the file is missing or was changed."""
    try:
        text = read_file(path).decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    end_of_body = len(text) - 65
    body = text[: max(end_of_body, 0)]
    return body if text == f"{body}{_digest(body)}\n" else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
