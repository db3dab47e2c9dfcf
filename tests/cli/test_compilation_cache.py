"""Compiled programs on disk: reused, never when corrupted, never without a bound."""

import os
import stat
import time
from pathlib import Path

import pytest
from corrupt_files import cut_off, empty, flip_bit, give_away, make_writable
from processes import run_python, run_scripts

from simplernn_jax.cli.compilation_cache import delete_invalid_entries, seal_entries


@pytest.fixture(autouse=True)
def default_settings(monkeypatch):
    for name in ("JAX_ENABLE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)


def run_program(**environment):
    """(result, number of programs loaded from the cache, standard error)."""
    command = ("tests/helpers/cached_program.py",)
    if any(name.startswith("JAX_") for name in environment):  # read when JAX is imported
        result = run_python(*command, **environment)
    else:
        (result,) = run_scripts(command, **environment)
    assert result.code == 0, result.errors
    *values, hits = result.output.split()
    return values, int(hits), result.errors


def entries_of(folder):
    return sorted(Path(folder).rglob("*-cache"))


def test_another_process_loads_compiled_programs_and_corrupted_ones_are_replaced(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    expected, hits, errors = run_program(**environment)
    assert (hits, errors) == (0, "")
    folder = tmp_path / "simplernn_jax" / "compiled"
    entries = entries_of(folder)
    assert any(path.name.startswith("jit_step-") for path in entries)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700  # its files will be executed
    assert run_program(**environment) == (expected, len(entries), "")
    for path, damage in zip(entries, (flip_bit, cut_off, empty) * len(entries), strict=False):
        damage(path)
    assert run_program(**environment) == (expected, 0, "")
    assert run_program(**environment) == (expected, len(entries), "")


def test_a_folder_of_the_users_choice_is_left_to_jax(tmp_path):
    environment = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine")}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "unused")
    expected, _, _ = run_program(**environment)
    entries = entries_of(tmp_path / "mine")
    assert run_program(**environment) == (expected, len(entries), "")
    assert sorted((tmp_path / "mine").glob("*")) == sorted((tmp_path / "mine").glob("*-[ac]*"))
    assert not (tmp_path / "unused").exists()


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path):
    (tmp_path / "file").write_text("")
    _, hits, errors = run_program(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert hits == 0
    assert len(errors.splitlines()) == 1
    assert "compiled programs are not cached: " in errors
    assert "Not a directory" in errors


def put(folder, key):
    """Write an entry as JAX does, with any permissions."""
    (folder / f"{key}-cache").write_bytes(f"program {key}".encode())
    (folder / f"{key}-cache").chmod(0o666)
    (folder / f"{key}-atime").write_bytes(time.time_ns().to_bytes(8, "little"))


@pytest.mark.parametrize("damage", [flip_bit, os.remove, make_writable, give_away])
@pytest.mark.parametrize("suffix", ["-cache", "-sha256"])
def test_corrupted_entries_are_deleted(tmp_path, damage, suffix):
    for key in ("key", "other", "third"):
        put(tmp_path, key)
    seal_entries(tmp_path)
    put(tmp_path, "half")  # the process ended before it was sealed
    damage(tmp_path / f"key{suffix}")
    delete_invalid_entries(tmp_path)
    suffixes = ("-atime", "-cache", "-sha256")
    found = sorted(path.name for path in tmp_path.glob("*-*"))
    assert found == [f"{key}{suffix}" for key in ("other", "third") for suffix in suffixes]
