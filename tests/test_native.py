"""The compiled C functions: what is in their cache, and what a compiler may do."""

import os
import shutil
import stat
from pathlib import Path

import jax
import pytest

from simplernn_jax.cache_folder import cache_folder
from simplernn_jax.ops import native
from simplernn_jax.ops.native import has_native_functions

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """Names made known to XLA, each time that the functions are loaded, with a cache of its own."""
    names = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *x, **_: names.append(x[0]))
    return names


def compiler(tmp_path, monkeypatch, *lines):
    """Makes CC a script; returns a file that tells how often it was asked to compile."""
    script, calls = tmp_path / "compiler", tmp_path / "calls"
    calls.touch()
    count = f'case "$1" in --version) ;; *) echo >>"{calls}" ;; esac'
    script.write_text("\n".join(["#!/bin/sh", count, *lines]) + "\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    return calls


def compilations(calls):
    return len(calls.read_text().splitlines())


def instead_of_compiling(source):
    """Lines of a compiler that makes a library of `source`, whatever it is given."""
    return [
        'case "$1" in --version) exit 0 ;; esac',
        "for last; do :; done",
        f"echo '{source}' | exec cc -shared -fPIC -x c - -o \"$last\"",
    ]


@pytest.fixture
def cached(tmp_path, monkeypatch, registered):
    """The functions, compiled once: the calls of the compiler, the library and its seal."""
    empty = " ".join(f"void {name}(void) {{}}" for name in native.FUNCTIONS)
    calls = compiler(tmp_path, monkeypatch, *instead_of_compiling(empty))
    assert has_native_functions.__wrapped__()
    (library,), (seal,) = (cache_folder("native").glob(f"*.{end}") for end in ("so", "sha256"))
    assert compilations(calls) == 1
    return calls, library, seal


def bad_byte(library, seal):
    seal.write_bytes(b"\xff" + seal.read_bytes()[1:])


def seal_that_never_ends(library, seal):
    seal.unlink()
    seal.symlink_to("/dev/zero")


def seal_that_waits(library, seal):
    seal.unlink()
    os.mkfifo(seal)


def library_that_never_ends(library, seal):
    library.unlink()
    library.symlink_to("/dev/zero")


def library_that_waits(library, seal):
    library.unlink()
    os.mkfifo(library)


def others_can_write_the_library(library, seal):
    library.chmod(0o775)


def others_can_write_the_seal(library, seal):
    seal.chmod(0o666)


@pytest.mark.parametrize(
    "damage",
    [
        bad_byte,
        seal_that_never_ends,
        seal_that_waits,
        library_that_never_ends,
        library_that_waits,
        others_can_write_the_library,
        others_can_write_the_seal,
    ],
)
def test_what_cannot_be_trusted_is_made_again(damage, cached, registered):
    calls, library, seal = cached
    damage(library, seal)
    assert has_native_functions.__wrapped__()
    assert compilations(calls) == 2
    assert stat.S_IMODE(library.stat().st_mode) == 0o700
    assert has_native_functions.__wrapped__()
    assert compilations(calls) == 2
    assert registered == [*native.FUNCTIONS] * 3


def test_a_folder_that_others_can_write_is_not_used(cached, registered):
    calls, library, _ = cached
    library.parent.chmod(0o777)
    made = library.stat().st_ino
    assert has_native_functions.__wrapped__()
    assert compilations(calls) == 2
    assert library.stat().st_ino == made


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_library_of_another_user_is_not_loaded(cached, registered):
    calls, library, _ = cached
    os.chown(library, 12345, 12345)
    assert has_native_functions.__wrapped__()
    assert compilations(calls) == 2
    assert library.stat().st_uid == 0
    os.chown(library.parent, 12345, 12345)
    assert has_native_functions.__wrapped__()
    assert compilations(calls) == 3


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["exit 0"], "native.so"),
        (
            ['case "$1" in --version) exit 0 ;; esac', "for last; do :; done", ': >"$last"'],
            "native.so",
        ),
        (["printf 'erreur: d\\351j\\340\\n' >&2", "exit 1"], "erreur: d\ufffdj\ufffd"),
        (['case "$1" in --version) exit 0 ;; esac', "exec sleep 100"], "timed out"),
        (["sleep 100 & exec sleep 100"], "timed out"),
        (["kill -SEGV $$"], "SIGSEGV"),
        (instead_of_compiling("int other;"), "a library without simplernn_forward"),
    ],
    ids=["nothing", "empty", "latin-1", "hangs", "hangs-at-once", "dies", "other-library"],
)
def test_a_compiler_that_does_anything_else(
    lines, reason, tmp_path, monkeypatch, registered, caplog
):
    compiler(tmp_path, monkeypatch, *lines)
    monkeypatch.setattr(native, "COMPILER_SECONDS", 1 if "sleep" in lines[-1] else 60)
    assert not has_native_functions.__wrapped__()
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "could not be compiled: " in warning.getMessage()
    assert reason in warning.getMessage()
    assert registered == []


@pytest.mark.parametrize("command", ['"x', "''", "/", "\\"])
def test_a_command_that_is_none(command, monkeypatch, registered, caplog):
    monkeypatch.setenv("CC", command)
    assert not has_native_functions.__wrapped__()
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


def test_the_sources_are_all_there():
    folder = Path(native.__file__).with_name("cpu")
    found = {path.name for path in folder.iterdir() if path.suffix in (".c", ".h")}
    assert found == {path.name for path in (*native._SOURCES, *native._HEADERS)}
