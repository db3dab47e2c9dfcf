"""Sealed files: what was written comes back, or nothing."""

import os

import pytest

from simplernn_jax.sealed_file import read_sealed, write_sealed


@pytest.mark.parametrize("body", ["", "one line\n", "ünï\r\n\ncode\n"])
def test_a_sealed_file_gives_its_body_back(tmp_path, body):
    path = str(tmp_path / "sealed")
    write_sealed(path, body)
    assert read_sealed(path) == body
    assert os.listdir(tmp_path) == ["sealed"]


def test_a_missing_or_binary_sealed_file_gives_nothing(tmp_path):
    assert read_sealed(str(tmp_path / "none")) is None
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    assert read_sealed(str(tmp_path / "binary")) is None


def test_a_failing_write_leaves_the_earlier_content(tmp_path, monkeypatch):
    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path = str(tmp_path / "sealed")
    write_sealed(path, "before\n")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_sealed(path, "after\n")
    assert read_sealed(path) == "before\n"
