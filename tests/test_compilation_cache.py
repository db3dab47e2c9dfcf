"""Compiled programs on disk: reused, never when damaged, never without a bound."""

import functools
import os
import stat
from pathlib import Path

import pytest
from damages import cut_off, empty, flip_bit, give_away, make_writable
from odd_files import put_odd_file
from processes import run_python, run_scripts
from small_runs import newest_checkpoint, write_corpus

from simplernn_jax.compilation_cache import ChecksummedCache


@pytest.fixture(autouse=True)
def default_settings(monkeypatch):
    for name in ("JAX_ENABLE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)


def run_program(**environment):
    """(result, number of programs loaded from the cache, standard error)."""
    command = ("tests/cached_program.py",)
    if any(name.startswith("JAX_") for name in environment):  # read when JAX is imported
        result = run_python(*command, **environment)
    else:
        (result,) = run_scripts(command, **environment)
    assert result.code == 0, result.errors
    *values, hits = result.output.split()
    return values, int(hits), result.errors


def files(folder, suffix):
    return sorted(path for path in Path(folder).rglob("*") if path.name.endswith(suffix))


def test_another_process_loads_compiled_programs_and_damaged_ones_are_replaced(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    expected, hits, errors = run_program(**environment)
    assert (hits, errors) == (0, "")
    folder = tmp_path / "simplernn_jax" / "compiled"
    entries = files(folder, "-cache")
    assert any(path.name.startswith("jit_step-") for path in entries)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700  # its files will be executed
    assert run_program(**environment) == (expected, len(entries), "")
    for path, damage in zip(entries, (flip_bit, cut_off, empty) * len(entries), strict=False):
        damage(path)
    # Fails where a new JAX no longer takes its cache from `get_file_cache`: it would load these.
    assert run_program(**environment) == (expected, 0, "")
    assert run_program(**environment) == (expected, len(entries), "")


def test_the_users_own_folder_and_bound_are_used(tmp_path):
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
    _, hits, errors = run_program(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert hits == 0
    assert len(errors.splitlines()) == 1
    assert "compiled programs are not cached: " in errors
    assert "Not a directory" in errors


def test_it_can_be_switched_off(tmp_path):
    _, hits, errors = run_program(
        XDG_CACHE_HOME=str(tmp_path), JAX_ENABLE_COMPILATION_CACHE="false"
    )
    assert (hits, errors) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_a_run_from_the_cache_is_bit_exact(tmp_path):
    source = write_corpus(tmp_path / "text")
    for name in ("cold", "warm"):
        command = (
            *("scripts/train.py", "--config=configs/tiny.py"),
            *(f"--workdir={tmp_path / name}", f"--config.data.source={source}"),
            *("--config.model.block=plain", "--config.model.num_layers=1"),
            *("--config.train.steps=3", "--config.data.sequence_length=7"),
            *("--config.train.sample_every=0", "--config.data.validation_fraction=0"),
        )
        (result,) = run_scripts(command, XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert result.code == 0, result.errors
        entries = files(tmp_path / "cache", "-cache")
        if name == "cold":
            compiled = [(path, path.stat().st_mtime_ns) for path in entries]
    assert any(path.name.startswith("jit_train_step-") for path in entries)
    assert [(path, path.stat().st_mtime_ns) for path in entries] == compiled  # no new ones
    assert newest_checkpoint(tmp_path / "warm") == newest_checkpoint(tmp_path / "cold")


def test_the_least_recently_used_entries_are_deleted(tmp_path):
    cache = ChecksummedCache(tmp_path, max_bytes=35)
    for number, key in enumerate(("first", "second", "third")):  # each used a second later
        cache.put(key, bytes([number]) * 10)
        os.utime(tmp_path / f"{key}-sha256", (1000 + number, 1000 + number))
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


def test_processes_share_the_bound(tmp_path):
    caches = [ChecksummedCache(tmp_path, max_bytes=320) for _ in range(2)]
    for number in range(100):
        caches[number % 2].put(f"key{number}", bytes(10))
    size = sum(path.stat().st_size for path in files(tmp_path, "-cache"))
    assert 280 <= size <= 320 + 2 * 30  # of each, what it puts before it sees what is there


def swap(path):
    """Exchange both files of two entries."""
    for suffix in ("-cache", "-sha256"):
        (path.parent / f"key{suffix}").rename(path.parent / "temporary")
        (path.parent / f"other{suffix}").rename(path.parent / f"key{suffix}")
        (path.parent / "temporary").rename(path.parent / f"other{suffix}")


@pytest.mark.parametrize(
    "damage",
    [flip_bit, cut_off, empty, os.remove, swap, make_writable, give_away]
    + [functools.partial(put_odd_file, kind) for kind in ("fifo", "endless")],
)
@pytest.mark.parametrize("suffix", ["-cache", "-sha256"])
def test_a_damaged_entry_is_not_used_and_is_replaced(tmp_path, damage, suffix):
    cache = ChecksummedCache(tmp_path, max_bytes=100)
    cache.put("key", b"compiled program")
    cache.put("other", b"another program")
    damage(tmp_path / f"key{suffix}")
    assert cache.get("key") is None
    cache.put("key", b"compiled program")
    assert cache.get("key") == b"compiled program"
    assert len(list(tmp_path.iterdir())) == 4


def test_entries_are_used_whatever_the_umask(tmp_path):
    cache = ChecksummedCache(tmp_path, max_bytes=100)
    umask = os.umask(0)
    try:
        cache.put("key", b"value")
    finally:
        os.umask(umask)
    assert cache.get("key") == b"value"


def test_a_disk_that_fails_is_one_warning(tmp_path, caplog):
    cache = ChecksummedCache(tmp_path / "gone", max_bytes=100)
    cache.put("key", b"value")
    cache.put("key", b"value")
    assert cache.get("key") is None
    assert [record.getMessage() for record in caplog.records] == [
        f"some programs are not cached: {tmp_path / 'gone'}: No such file or directory"
    ]
