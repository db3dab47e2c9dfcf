"""The C functions of this folder: compiled where they run, once, and made known to XLA.

A compiler that knows the machine uses all of its vector instructions; a program compiled for
every machine could not. Where there is no compiler, nothing is lost but time.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from simplernn_jax.cache_folder import cache_folder
from simplernn_jax.errors import one_line
from simplernn_jax.files import open_file, read_file, sha256_hex

FORWARD = "simplernn_forward"
BACKWARD = "simplernn_backward"
CONVOLUTION_FORWARD = "simplernn_convolution_forward"
CONVOLUTION_BACKWARD = "simplernn_convolution_backward"
NORM_FORWARD = "simplernn_norm_forward"
NORM_BACKWARD = "simplernn_norm_backward"

LEAST_ENTRIES = 1 << 14

FUNCTIONS = (
    FORWARD,
    BACKWARD,
    CONVOLUTION_FORWARD,
    CONVOLUTION_BACKWARD,
    NORM_FORWARD,
    NORM_BACKWARD,
)
_FOLDER = Path(__file__).with_name("cpu")
_SOURCES = [_FOLDER / name for name in ("fused.c", "rms_norm.c")]
_HEADERS = [_FOLDER / name for name in ("call.h", "buffers.h")]
_OPTIONS = ("-O3", "-std=c11", "-ffp-contract=fast", "-shared", "-fPIC")
_FOR_THIS_MACHINE = (("-march=native",), ("-mcpu=native",), ())
"""Tried in this order: compilers and processors differ in which of them they know."""

COMPILER_SECONDS = 120
"""A compiler that takes longer is stopped; it takes about 5."""


def can_call(dtype: Any) -> bool:
    """Whether the functions can take arrays of `dtype` here: float32, a CPU and a C compiler."""
    return dtype == jnp.float32 and jax.default_backend() == "cpu" and has_native_functions()


def takes_native(x: jax.Array, native: bool | None) -> bool:
    """Whether a function that passes over `x` is to be called.

    Args:
      x: the array.
      native: True or False say so; None asks whether it takes less time than XLA's own loops (a
        call costs some 5 microseconds, as much as a few small operations).

    Raises:
      ValueError: `native` is True and there is no such function for `x` here.
    """
    if native and not can_call(x.dtype):
        raise ValueError(f"native=True: needs float32 (got {x.dtype}), a CPU and a C compiler")
    # Sizes that `jax.export` leaves open are not known.
    if not all(isinstance(size, int) for size in x.shape) or 0 in x.shape:
        return False
    return bool(native) if native is not None else x.size >= LEAST_ENTRIES and can_call(x.dtype)


@functools.cache
def has_native_functions() -> bool:
    """Whether XLA can call the C functions on the CPU; compiles them at the first call.

    What was compiled is kept in the user's cache folder under a name that follows from source,
    compiler and processor. Where it cannot be compiled or loaded, a warning says why, once.
    """
    try:
        command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    except ValueError as error:
        logging.warning("the fast recurrence could not be compiled: CC: %s", error)
        return False
    if shutil.which(command[0]) is None:
        logging.warning(
            "no C compiler (%s): the recurrence takes several times as long on a CPU; install one "
            "(Debian: apt install gcc; macOS: xcode-select --install) or set CC",
            command[0],
        )
        return False
    try:
        library = _load(command)
    except (OSError, subprocess.SubprocessError) as error:
        printed = getattr(error, "output", None) or b""
        reason = printed.decode(errors="replace").strip() or str(error)
        logging.warning("the fast recurrence could not be compiled: %s", one_line(reason))
        return False
    for name in FUNCTIONS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return True


def _load(command: list[str]) -> ctypes.CDLL:
    name = _fingerprint(command)
    try:
        folder = cache_folder("native")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds what will be executed
        _check_owner(os.stat(folder), folder)
        kept, seal = folder / f"{name}.so", folder / f"{name}.sha256"
        if _is_sealed(kept, seal):
            return _open(kept)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = _compile(command, Path(work))
            library = _open(made)
            Path(work, "seal").write_text(sha256_hex(read_file(made)))
            for file, mode in ((made, 0o700), (Path(work, "seal"), 0o600)):
                file.chmod(mode)  # whatever the umask is
            os.replace(made, kept)
            os.replace(Path(work, "seal"), seal)
            return library
    except (OSError, RuntimeError) as error:
        logging.info("compiled code is not kept: %s", error)
    # Once it is loaded, the file is no longer needed.
    with tempfile.TemporaryDirectory() as work:
        return _open(_compile(command, Path(work)))


def _open(file: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(file))
    for name in FUNCTIONS:
        if not hasattr(library, name):
            raise OSError(f"{file}: a library without {name}")
    return library


def _compile(command: list[str], folder: Path) -> Path:
    target = folder / "native.so"
    sources = [str(source) for source in _SOURCES]
    failure = None
    for machine in _FOR_THIS_MACHINE:
        arguments = [*_OPTIONS, *machine, f"-I{jax.ffi.include_dir()}", *sources, "-lm"]
        try:
            _run([*command, *arguments, "-o", str(target)])
            return target
        except subprocess.CalledProcessError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _run(arguments: list[str]) -> bytes:
    """What a compiler prints, which may be anything; it is stopped if it does not end.

    Raises:
      OSError: it cannot be started.
      SubprocessError: it fails, or takes longer than `COMPILER_SECONDS`.
    """
    # A file, not a pipe: processes that a compiler leaves behind would keep a pipe open.
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(COMPILER_SECONDS)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        printed.seek(0)
        output = printed.read(1 << 20)
    if code:
        raise subprocess.CalledProcessError(code, arguments, output)
    return output


def _fingerprint(command: list[str]) -> str:
    """Changes with everything on which the compiled code depends."""
    version = _run([*command, "--version"])
    digest = hashlib.sha256()
    for source in (*_SOURCES, *_HEADERS):
        digest.update(source.read_bytes())
    for header in sorted(Path(jax.ffi.include_dir()).rglob("*.h")):
        digest.update(header.read_bytes())
    for text in (*command, *_OPTIONS, platform.machine(), platform.processor(), *_processor()):
        digest.update(text.encode() + b"\n")
    digest.update(version)
    return digest.hexdigest()[:32]


def _processor() -> Iterator[str]:
    """Lines that tell processors of different instruction sets apart, where the system has them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    kinds = ("model", "flags", "Features", "CPU part")
    yield from sorted({line for line in lines if line.startswith(kinds)})


def _is_sealed(file: Path, seal: Path) -> bool:
    """Whether the file is what this user compiled: whole, and nobody else can have written it."""
    try:
        for path in (file, seal):
            with open_file(path) as opened:
                _check_owner(os.fstat(opened.fileno()), path)
        return read_file(seal, 1 << 10) == sha256_hex(read_file(file)).encode()
    except OSError:
        return False


def _check_owner(status: os.stat_result, path: Path) -> None:
    if status.st_uid not in (os.geteuid(), 0):
        raise OSError(f"{path}: belongs to another user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"{path}: others can write it")
