"""Other things in the place of a regular file, to read which would hang, never end, or fail."""

import os

ODD_FILES = {
    "fifo": os.mkfifo,
    "folder": os.mkdir,
    "endless": lambda path: os.symlink("/dev/zero", path),
}


def put_odd_file(kind, path):
    """Replace the file at `path`."""
    path.unlink(missing_ok=True)
    ODD_FILES[kind](path)
