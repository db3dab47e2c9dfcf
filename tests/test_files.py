"""Regular files are read with a bound and replaced whole or not at all."""

import os
import stat
from unittest import mock

import pytest
from corrupt_files import ODD_FILES, put_odd_file

from simplernn_jax.files import (
    check_output,
    open_file,
    read_file,
    read_sealed,
    write_file,
    write_sealed,
)


def test_content_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "file"
    for content in (b"first, and longer", b"second", b""):
        write_file(str(path), content)
        assert path.read_bytes() == content
        assert read_file(path) == content
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failure_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch, name):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, name, mock.Mock(side_effect=OSError(28, os.strerror(28))))
    with pytest.raises(OSError, match="No space left"):
        write_file(str(path), b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", ODD_FILES)
def test_only_regular_files_are_read_or_replaced(tmp_path, kind):
    path = tmp_path / "file"
    put_odd_file(kind, path)
    before = os.lstat(path)
    for use in (open_file, read_file, check_output, lambda path: write_file(path, b"new")):
        with pytest.raises(OSError, match=r"not a regular file|a folder"):
            use(path)
    after = os.lstat(path)
    assert (after.st_ino, stat.S_IFMT(after.st_mode)) == (
        before.st_ino,
        stat.S_IFMT(before.st_mode),
    )
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_to_a_file_stays_a_link(tmp_path):
    target, path = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    path.symlink_to(target)
    write_file(path, b"new")
    assert path.is_symlink()
    assert target.read_bytes() == b"new"


def test_a_file_over_the_limit_is_rejected(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_file(path, 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_file(path, 4)


@pytest.mark.parametrize("body", ["", "one line\n", "ünï\r\n\ncode\n"])
def test_a_sealed_file_returns_its_body(tmp_path, body):
    write_sealed(tmp_path / "sealed", body)
    assert read_sealed(tmp_path / "sealed") == body
    assert os.listdir(tmp_path) == ["sealed"]


def test_a_missing_or_binary_sealed_file_returns_none(tmp_path):
    assert read_sealed(tmp_path / "none") is None
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    assert read_sealed(tmp_path / "binary") is None
