"""Corruption of files, the same at every run, and other things in their place."""

import os

import pytest


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def make_writable(path):
    path.chmod(0o777)


def give_away(path):
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(path, 12345, 12345)


ODD_FILES = {
    "fifo": os.mkfifo,
    "folder": os.mkdir,
    "endless": lambda path: os.symlink("/dev/zero", path),
}


def put_odd_file(kind, path):
    """Replace the file at `path`."""
    path.unlink(missing_ok=True)
    ODD_FILES[kind](path)
