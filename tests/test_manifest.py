"""Manifests: every change to a folder shows."""

import os

import pytest

from simplernn_jax.checkpoint import manifest
from simplernn_jax.sealed_file import write_sealed


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inner" / "empty").mkdir(parents=True)
    (tmp_path / "inner" / "first file").write_bytes(bytes(range(256)) * 7)
    (tmp_path / "inner" / "nothing").write_bytes(b"")
    (tmp_path / "last").write_bytes(b"\n\r\n")
    manifest.write_manifest(str(tmp_path))
    return tmp_path


def test_an_untouched_folder_is_whole(folder):
    assert manifest.has_manifest(str(folder))
    assert manifest.find_damage(str(folder)) is None


def test_a_folder_without_a_manifest_is_not_whole(tmp_path):
    assert not manifest.has_manifest(str(tmp_path))
    assert manifest.find_damage(str(tmp_path)) == "manifest.sha256 is missing"


def test_every_flipped_bit_of_the_manifest_shows(folder):
    path = folder / manifest.MANIFEST_NAME
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        assert manifest.find_damage(str(folder)) == "manifest.sha256 was changed"


def test_every_truncation_of_the_manifest_shows(folder):
    path = folder / manifest.MANIFEST_NAME
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert manifest.find_damage(str(folder)) == "manifest.sha256 was changed"


def test_a_flipped_bit_names_the_file(folder):
    path = folder / "inner" / "first file"
    content = bytearray(path.read_bytes())
    content[1031] ^= 32
    path.write_bytes(content)
    assert manifest.find_damage(str(folder)) == "inner/first file was changed"


def test_bytes_outside_the_wanted_parts_are_left_to_another_time(folder):
    (folder / "last").write_bytes(b"\n\n\n")
    assert manifest.find_damage(str(folder), ["inner"]) is None
    assert manifest.find_damage(str(folder)) == "last was changed"
    (folder / "inner" / "first file").write_bytes(bytes(256 * 7))
    assert manifest.find_damage(str(folder), ["inner"]) == "inner/first file was changed"


def test_another_size_names_the_file_and_both_sizes(folder):
    (folder / "last").write_bytes(b"\n\r")
    assert manifest.find_damage(str(folder)) == "last has 2 bytes instead of 3"


def test_a_missing_file_is_named(folder):
    (folder / "inner" / "nothing").unlink()
    assert manifest.find_damage(str(folder)) == "inner/nothing is missing"


def test_an_additional_file_is_named(folder):
    (folder / "inner" / "empty" / "other").write_bytes(b"")
    assert manifest.find_damage(str(folder)) == "inner/empty/other does not belong there"


def test_a_file_that_became_a_folder_is_named(folder):
    (folder / "last").unlink()
    (folder / "last").mkdir()
    assert manifest.find_damage(str(folder)) == "last is missing"


def test_a_manifest_written_again_covers_the_new_content(folder):
    (folder / "last").write_bytes(b"new")
    manifest.write_manifest(str(folder))
    assert manifest.find_damage(str(folder)) is None


def put_pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def put_endless(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("put", [put_pipe, put_endless])
def test_pipes_and_devices_are_damage_and_no_hang(folder, put):
    put(folder / "inner" / "nothing")  # as large as it should be, by what the file system says
    expected = "inner/nothing is not a regular file"
    assert manifest.find_damage(str(folder)) == expected
    assert manifest.find_damage(str(folder), ["other"]) == expected
    put(folder / manifest.MANIFEST_NAME)
    assert manifest.find_damage(str(folder)) == "manifest.sha256 was changed"


@pytest.mark.parametrize("body", ["no manifest\n", "0" * 64 + " -1 last\n", "0" * 64 + " 12\n"])
def test_a_sealed_text_that_is_no_manifest_is_damage(folder, body):
    write_sealed(str(folder / manifest.MANIFEST_NAME), body)
    assert manifest.find_damage(str(folder)) == "manifest.sha256 is no manifest"
