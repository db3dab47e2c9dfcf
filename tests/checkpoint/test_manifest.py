"""Manifests: every change to a folder shows."""

import errno
import functools
import os

import pytest
from damages import put_odd_file

from simplernn_jax.checkpoint import manifest
from simplernn_jax.files import open_file


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inner" / "empty").mkdir(parents=True)
    (tmp_path / "inner" / "first file").write_bytes(bytes(range(256)) * 7)
    (tmp_path / "inner" / "nothing").write_bytes(b"")
    (tmp_path / "last").write_bytes(b"\n\r\n")
    manifest.write_manifest(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", [manifest.MANIFEST_NAME, "last"])
def test_an_error_of_the_machine_is_not_corruption(folder, monkeypatch, name):
    def reject(path, **options):
        if os.path.basename(path) == name:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        return open_file(path, **options)

    for module in ("files", "checkpoint.manifest"):
        monkeypatch.setattr(f"simplernn_jax.{module}.open_file", reject)
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        manifest.find_corruption(str(folder))


def test_every_flipped_bit_and_every_truncation_of_the_manifest_shows(folder):
    path = folder / manifest.MANIFEST_NAME
    whole = path.read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        for damaged in (flipped, whole[:position]):
            path.write_bytes(damaged)
            assert (
                manifest.find_corruption(str(folder)) == "manifest.sha256 is missing or was changed"
            )


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
    expected = "inner/nothing cannot be read (not a regular file)"
    assert manifest.find_corruption(str(folder)) == expected
