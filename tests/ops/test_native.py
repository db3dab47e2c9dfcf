"""Compilation of the C functions, their cache, failing compilers; and calls that are wrong."""

import functools

import jax
import pytest
from corrupt_files import give_away, make_writable
from processes import run_python
from references import needs_compiler

from simplernn_jax.files import cache_folder
from simplernn_jax.ops import native
from simplernn_jax.ops.native import has_native_functions

pytestmark = needs_compiler


def load_again():
    """Load the functions as in a new process."""
    native._register_functions.cache_clear()
    return has_native_functions()


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """Names registered with XLA, by loads from a new cache."""
    names = []
    monkeypatch.setattr(
        native, "_register_functions", functools.cache(native._register_functions.__wrapped__)
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *x, **_: names.append(x[0]))
    return names


def compiler(tmp_path, monkeypatch, *lines):
    """Make CC a script; returns a file with one line per compilation."""
    script, calls = tmp_path / "compiler", tmp_path / "calls"
    calls.touch()
    count = f'case "$1" in --version) ;; *) echo >>"{calls}" ;; esac'
    script.write_text("\n".join(["#!/bin/sh", count, *lines]) + "\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    return calls


def compilations(calls):
    return len(calls.read_text().splitlines())


@pytest.fixture
def cached(tmp_path, monkeypatch, registered):
    """The functions, compiled once: the file that counts compilations, and the library."""
    empty = " ".join(f"void {name}(void) {{}}" for name in native.FUNCTIONS)
    calls = compiler(
        tmp_path,
        monkeypatch,
        'case "$1" in --version) exit 0 ;; esac',
        "for last; do :; done",
        f"echo '{empty}' | exec cc -shared -fPIC -x c - -o \"$last\"",
    )
    assert load_again()
    (library,) = cache_folder("native").glob("*.so")
    assert compilations(calls) == 1
    return calls, library


def test_later_processes_load_the_cached_library(cached, registered):
    assert load_again()
    assert compilations(cached[0]) == 1
    assert registered == [*native.FUNCTIONS] * 2


@pytest.mark.parametrize("damage", [make_writable, give_away])
def test_untrusted_folder_is_not_used(damage, cached, registered):
    calls, library = cached
    inode = library.stat().st_ino
    damage(library.parent)
    assert load_again()
    assert compilations(calls) == 2
    assert library.stat().st_ino == inode


@pytest.mark.parametrize(
    ("command", "lines", "reason"),
    [
        (None, ["exit 0"], "could not be compiled: "),
        (
            None,
            ["printf 'erreur: d\\351j\\340\\n' >&2", "exit 1"],
            "compiled: erreur: d\ufffdj\ufffd",
        ),
        (None, ["exec sleep 100"], "timed out"),
        ('"x', [], "could not be compiled: No closing quotation"),
        ("no-such-compiler", [], "no C compiler (no-such-compiler)"),
    ],
    ids=["nothing", "latin-1", "hangs", "quotation", "missing"],
)
def test_failing_compiler(command, lines, reason, tmp_path, monkeypatch, registered, caplog):
    compiler(tmp_path, monkeypatch, *lines)
    if command is not None:
        monkeypatch.setenv("CC", command)
    monkeypatch.setattr(native, "COMPILER_SECONDS", 1 if "exec sleep 100" in lines else 60)
    assert not load_again()
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert reason in warning.getMessage()
    assert registered == []


def test_cache_that_cannot_be_written(tmp_path, cached, registered, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load_again()
    assert compilations(cached[0]) == 2


@pytest.mark.parametrize(
    ("lines", "is_fast"),
    [
        (("flags\t\t: fma avx512_bf16 amx_bf16", "vendor_id\t: GenuineIntel"), True),
        (("flags\t\t: fma avx512_bf16", "vendor_id\t: GenuineIntel"), False),
        (("flags\t\t: fma avx512_bf16", "vendor_id\t: AuthenticAMD"), True),
        ((), False),
    ],
)
def test_bfloat16_is_fast_with_amx_and_on_amd_with_avx512(monkeypatch, lines, is_fast):
    monkeypatch.setattr(native, "processor_lines", lambda: lines)
    assert native.has_fast_bfloat16.__wrapped__() == is_fast  # not from the cache


@pytest.mark.slow
@pytest.mark.oldest_python
def test_a_wrong_call_of_a_c_function_is_an_exception():
    code, text, errors = run_python("tests/helpers/wrong_calls.py", 500, timeout=600)
    assert code == 0, errors[-5000:]
    assert 125 < int(text) < 500
