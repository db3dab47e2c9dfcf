"""Compiled programs on disk, in a folder of the user alone."""

import stat
from pathlib import Path

import pytest
from corrupt_files import give_away, make_writable
from processes import run_python, run_scripts

PROGRAM = """
import warnings

import jax
import jax.monitoring
import jax.numpy as jnp

from simplernn_jax.cli.compilation_cache import use_compilation_cache

warnings.simplefilter("error")
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
use_compilation_cache()
total = jax.jit(lambda x: jnp.sin(x).sum())(jnp.linspace(0.0, 1.0, 49))
print(total, sum(event.endswith("/cache_hits") for event in events))
"""


@pytest.fixture(autouse=True)
def default_settings(monkeypatch):
    for name in ("JAX_ENABLE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run_program(tmp_path):
    """Run the program with other variables: its result, the programs it loaded, its errors."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)

    def run(**environment):
        if any(name.startswith("JAX_") for name in environment):  # read when JAX is imported
            result = run_python(script, **environment)
        else:
            (result,) = run_scripts((script,), **environment)
        assert result.code == 0, result.errors
        value, hits = result.output.split()
        return value, int(hits), result.errors

    return run


def entries_of(folder):
    return sorted(Path(folder).rglob("*-cache"))


def test_another_process_loads_compiled_programs_that_were_written_to_their_end(
    tmp_path, run_program
):
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    expected, hits, errors = run_program(**environment)
    assert (hits, errors) == (0, "")
    folder = tmp_path / "simplernn_jax" / "compiled"
    entries = entries_of(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700  # its files will be executed
    time_of_use = entries[0].name.removesuffix("cache") + "atime"  # JAX writes it last
    (folder / time_of_use).unlink()
    assert run_program(**environment) == (expected, len(entries) - 1, "")
    assert (folder / time_of_use).exists()


def test_a_folder_of_the_users_choice_is_left_to_jax(tmp_path, run_program):
    environment = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine")}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "unused")
    run_program(**environment)
    assert entries_of(tmp_path / "mine")
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (make_writable, "is group- or world-writable"),
        (give_away, "belongs to another user"),
        (lambda folder: (folder.rmdir(), folder.write_text("")), "File exists"),
    ],
)
def test_a_folder_that_is_not_ours_alone_is_one_warning(tmp_path, run_program, spoil, reason):
    folder = tmp_path / "simplernn_jax" / "compiled"
    folder.mkdir(parents=True)
    spoil(folder)
    _, hits, errors = run_program(XDG_CACHE_HOME=str(tmp_path))
    assert hits == 0
    assert len(errors.splitlines()) == 1
    assert f"compiled programs are not cached: {reason}" in errors
    assert entries_of(tmp_path) == []
