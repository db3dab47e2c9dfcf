"""Compiled programs on disk: used again, never damaged ones, never without a bound."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import newest_checkpoint, write_corpus

from simplernn_jax.compilation_cache import SealedFolder

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import functools, jax, jax.monitoring, jax.numpy as jnp
from simplernn_jax.compilation_cache import use_compilation_cache

hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None
)
use_compilation_cache()

@functools.partial(jax.jit, donate_argnums=0)
def step(state, x):
    return jnp.tanh(state @ x + jnp.sin(state)), state.sum()

state, total = step(jnp.linspace(0.0, 1.0, 49).reshape(7, 7), jnp.full((7, 7), 0.3))
print(jax.device_get(state).tobytes().hex(), total, len(hits))
"""


def start(command, **environment):
    """(standard output, standard error) of a process that uses the cache."""
    without = ("JAX_ENABLE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR")
    inherited = {name: value for name, value in os.environ.items() if name not in without}
    done = subprocess.run(
        [sys.executable, "-W", "error", *command],
        check=False,
        capture_output=True,
        env=inherited | {"PYTHONPATH": str(ROOT)} | environment,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def run_program(**environment):
    """(what it computed, programs it found in the cache, standard error)."""
    output, errors = start(["-c", PROGRAM], **environment)
    *result, hits = output.split()
    return result, int(hits), errors


def files(folder, suffix):
    return sorted(path for path in Path(folder).rglob("*") if path.name.endswith(suffix))


def change_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:9])


def empty(path):
    path.write_bytes(b"")


def test_another_process_loads_what_one_compiled_and_damage_is_mended(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    expected, hits, errors = run_program(**environment)
    assert (hits, errors) == (0, "")
    folder = tmp_path / "simplernn_jax" / "compiled"
    entries = files(folder, "-cache")
    assert any(path.name.startswith("jit_step-") for path in entries)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700  # what lies there will be executed
    assert run_program(**environment) == (expected, len(entries), "")
    for path, damage in zip(entries, (change_a_bit, cut_off, empty) * len(entries), strict=False):
        damage(path)
    assert run_program(**environment) == (expected, 0, "")
    assert run_program(**environment) == (expected, len(entries), "")


def test_the_users_own_folder_and_bound_count(tmp_path):
    environment = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine")}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "unused")
    expected, _, _ = run_program(**environment)
    sizes = [path.stat().st_size for path in files(tmp_path / "mine", "-cache")]
    assert run_program(**environment) == (expected, len(sizes), "")
    assert not (tmp_path / "unused").exists()
    bound = sum(sizes) // 2
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "small")}
    run_program(**environment, JAX_COMPILATION_CACHE_MAX_SIZE=str(bound))
    assert 0 < sum(path.stat().st_size for path in files(tmp_path / "small", "-cache")) <= bound


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path):
    (tmp_path / "file").write_text("")
    for _ in range(2):
        _, hits, errors = run_program(XDG_CACHE_HOME=str(tmp_path / "file"))
        assert hits == 0
        assert len(errors.splitlines()) == 1
        assert "compiled programs are not kept: " in errors
        assert "Not a directory" in errors


def test_it_can_be_switched_off(tmp_path):
    _, hits, errors = run_program(
        XDG_CACHE_HOME=str(tmp_path), JAX_ENABLE_COMPILATION_CACHE="false"
    )
    assert (hits, errors) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_a_run_from_the_cache_ends_in_the_same_bytes(tmp_path):
    source = write_corpus(tmp_path / "text")
    for name in ("cold", "warm"):
        command = [str(ROOT / "scripts" / "train.py"), f"--config={ROOT / 'configs' / 'tiny.py'}"]
        command += [f"--workdir={tmp_path / name}", f"--config.data.source={source}"]
        command += ["--config.model.block=plain", "--config.train.steps=3"]
        start(command, XDG_CACHE_HOME=str(tmp_path / "cache"))
        entries = files(tmp_path / "cache", "-cache")
        if name == "cold":
            compiled = [(path, path.stat().st_mtime_ns) for path in entries]
    assert any(path.name.startswith("jit_train_step-") for path in entries)
    assert [(path, path.stat().st_mtime_ns) for path in entries] == compiled  # none anew
    assert newest_checkpoint(tmp_path / "warm") == newest_checkpoint(tmp_path / "cold")


def put_three(folder, cache):
    """Entries of 10 bytes, each used a second after the one before it."""
    for number, key in enumerate(("first", "second", "third")):
        cache.put(key, bytes([number]) * 10)
        os.utime(folder / f"{key}-sha256", (1000 + number, 1000 + number))


def test_the_entries_used_longest_ago_make_room(tmp_path):
    cache = SealedFolder(tmp_path, max_bytes=35)
    put_three(tmp_path, cache)
    (tmp_path / "theirs-cache").write_bytes(b"of another program")
    assert cache.get("first") == bytes(10)
    cache.put("fourth", b"x" * 12)
    kept = [key for key in ("first", "second", "third", "fourth") if cache.get(key) is not None]
    assert kept == ["first", "third", "fourth"]
    cache.put("fifth", b"x" * 36)  # fits nowhere: for it nothing is given up
    assert cache.get("first") == bytes(10)
    assert not list(tmp_path.glob("second*"))
    assert cache.get("theirs") is None
    assert (tmp_path / "theirs-cache").exists()


@pytest.mark.parametrize("damage", [change_a_bit, cut_off, empty, os.remove])
@pytest.mark.parametrize("suffix", ["-cache", "-sha256"])
def test_what_was_changed_is_not_used_and_can_be_put_again(tmp_path, damage, suffix):
    cache = SealedFolder(tmp_path, max_bytes=100)
    cache.put("key", b"compiled program")
    damage(tmp_path / f"key{suffix}")
    assert cache.get("key") is None
    cache.put("key", b"compiled program")
    assert cache.get("key") == b"compiled program"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_disk_that_fails_is_one_warning(tmp_path, caplog):
    cache = SealedFolder(tmp_path / "gone", max_bytes=100)
    cache.put("key", b"value")
    cache.put("key", b"value")
    assert cache.get("key") is None
    assert [record.getMessage() for record in caplog.records] == [
        f"not all is kept: {tmp_path / 'gone'}: No such file or directory"
    ]


@pytest.mark.parametrize("suffix", ["-cache", "-sha256"])
def test_a_pipe_in_the_place_of_an_entry_is_replaced(tmp_path, suffix):
    folder = SealedFolder(tmp_path, 1000)
    folder.put("key", b"program")
    (tmp_path / f"key{suffix}").unlink()
    os.mkfifo(tmp_path / f"key{suffix}")
    assert folder.get("key") is None
    folder.put("key", b"program")
    assert folder.get("key") == b"program"


def test_an_entry_that_never_ends_is_none(tmp_path):
    folder = SealedFolder(tmp_path, 1000)
    folder.put("key", b"program")
    (tmp_path / "key-cache").unlink()
    (tmp_path / "key-cache").symlink_to("/dev/zero")
    assert folder.get("key") is None
