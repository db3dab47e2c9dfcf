"""Manifests: every change to a folder shows."""

import errno
import functools
import os
from unittest import mock

import pytest
from odd_files import put_odd_file

from simplernn_jax.checkpoint import manifest
from simplernn_jax.files import open_file, write_sealed


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inner" / "empty").mkdir(parents=True)
    (tmp_path / "inner" / "first file").write_bytes(bytes(range(256)) * 7)
    (tmp_path / "inner" / "nothing").write_bytes(b"")
    (tmp_path / "last").write_bytes(b"\n\r\n")
    manifest.write_manifest(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", [manifest.MANIFEST_NAME, "last"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ENOMEM])
def test_an_error_of_the_machine_is_not_corruption(folder, monkeypatch, name, number):
    def refuse(path, **options):
        if os.path.basename(path) == name:
            raise OSError(number, os.strerror(number), path)
        return open_file(path, **options)

    for module in ("files", "checkpoint.manifest"):
        monkeypatch.setattr(f"simplernn_jax.{module}.open_file", refuse)
    with pytest.raises(OSError, match=os.strerror(number)):
        manifest.find_corruption(str(folder))


@pytest.mark.parametrize("function", ["lstat", "scandir"])
def test_a_folder_that_may_not_be_searched_is_not_corrupt(folder, monkeypatch, function):
    problem = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    monkeypatch.setattr(os, function, mock.Mock(side_effect=problem))
    with pytest.raises(PermissionError):
        manifest.find_corruption(str(folder))


def test_an_untouched_folder_is_intact(folder):
    assert manifest.find_corruption(str(folder)) is None


def test_a_folder_without_a_manifest_is_corrupt(tmp_path):
    assert manifest.find_corruption(str(tmp_path)) == "manifest.sha256 is missing"


def test_every_flipped_bit_and_every_truncation_of_the_manifest_shows(folder):
    path = folder / manifest.MANIFEST_NAME
    whole = path.read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        for damaged in (flipped, whole[:position]):
            path.write_bytes(damaged)
            assert manifest.find_corruption(str(folder)) == "manifest.sha256 was changed"


@pytest.mark.parametrize(
    ("name", "change", "damage"),
    [
        ("inner/first file", lambda path: path.write_bytes(bytes(256 * 7)), "was changed"),
        ("last", lambda path: path.write_bytes(b"\n\r"), "has 2 bytes instead of 3"),
        ("inner/nothing", lambda path: path.unlink(), "is missing"),
        ("inner/empty/other", lambda path: path.write_bytes(b""), "does not belong there"),
        ("last", functools.partial(put_odd_file, "folder"), "is missing"),
    ],
)
def test_a_corrupt_file_is_named(folder, name, change, damage):
    change(folder / name)
    assert manifest.find_corruption(str(folder)) == f"{name} {damage}"


def test_bytes_outside_the_given_parts_are_not_verified(folder):
    (folder / "last").write_bytes(b"\n\n\n")
    assert manifest.find_corruption(str(folder), ["inner"]) is None
    assert manifest.find_corruption(str(folder)) == "last was changed"
    (folder / "inner" / "first file").write_bytes(bytes(256 * 7))
    assert manifest.find_corruption(str(folder), ["inner"]) == "inner/first file was changed"


def test_a_rewritten_manifest_covers_the_new_content(folder):
    (folder / "last").write_bytes(b"new")
    manifest.write_manifest(str(folder))
    assert manifest.find_corruption(str(folder)) is None


@pytest.mark.parametrize("kind", ["fifo", "endless"])
def test_pipes_and_devices_are_corruption_without_a_hang(folder, kind):
    put_odd_file(kind, folder / "inner" / "nothing")  # of the right size, by its status
    expected = "inner/nothing is not a regular file"
    assert manifest.find_corruption(str(folder)) == expected
    assert manifest.find_corruption(str(folder), ["other"]) == expected
    put_odd_file(kind, folder / manifest.MANIFEST_NAME)
    assert manifest.find_corruption(str(folder)) == "manifest.sha256 was changed"


@pytest.mark.parametrize("body", ["no manifest\n", "0" * 64 + " -1 last\n", "0" * 64 + " 12\n"])
def test_a_sealed_text_that_is_no_manifest_is_corruption(folder, body):
    write_sealed(str(folder / manifest.MANIFEST_NAME), body)
    assert manifest.find_corruption(str(folder)) == "manifest.sha256 is not a manifest"
