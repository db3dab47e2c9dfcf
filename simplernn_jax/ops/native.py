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
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from simplernn_jax.cache_folder import cache_folder

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
_SOURCES = [Path(__file__).with_name(name) for name in ("fused.c", "normalized.c")]
_HEADERS = [Path(__file__).with_name(name) for name in ("call.h", "buffers.h")]
_OPTIONS = ("-O3", "-std=c11", "-ffp-contract=fast", "-shared", "-fPIC")
_FOR_THIS_MACHINE = (("-march=native",), ("-mcpu=native",), ())
"""Tried in this order: compilers and processors differ in which of them they know."""


def can_call(dtype: Any) -> bool:
    """Whether the functions can take arrays of `dtype` here: float32, a CPU and a C compiler."""
    return dtype == jnp.float32 and jax.default_backend() == "cpu" and has_native_functions()


def is_worth_a_call(x: jax.Array) -> bool:
    """Whether a function that passes over `x` takes less time than XLA's own loops.

    A call costs some 5 microseconds, as much as a few small operations.
    """
    return can_call(x.dtype) and x.size >= LEAST_ENTRIES


@functools.cache
def has_native_functions() -> bool:
    """Whether XLA can call the C functions on the CPU; compiles them at the first call.

    What was compiled is kept in the user's cache folder under a name that follows from source,
    compiler and processor. Where it cannot be compiled or loaded, a warning says why, once.
    """
    command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(command[0]) is None:
        logging.warning(
            "no C compiler (%s): the recurrence takes several times as long on a CPU; install one "
            "(Debian: apt install gcc; macOS: xcode-select --install) or set CC",
            command[0],
        )
        return False
    try:
        library = _load(command)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        logging.warning("the fast recurrence could not be compiled: %s", str(reason).strip())
        return False
    for name in FUNCTIONS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return True


def _load(command: list[str]) -> ctypes.CDLL:
    name = _fingerprint(command)
    try:
        folder = cache_folder("native")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds what will be executed
        kept, seal = folder / f"{name}.so", folder / f"{name}.sha256"
        if not _is_sealed(kept, seal):
            with tempfile.TemporaryDirectory(dir=folder) as work:
                made = _compile(command, Path(work))
                Path(work, "seal").write_text(_digest(made), encoding="ascii")
                os.replace(made, kept)
                os.replace(Path(work, "seal"), seal)
        return ctypes.CDLL(str(kept))
    except (OSError, RuntimeError) as error:
        logging.info("compiled code is not kept: %s", error)
    # Once it is loaded, the file is no longer needed.
    with tempfile.TemporaryDirectory() as work:
        return ctypes.CDLL(str(_compile(command, Path(work))))


def _compile(command: list[str], folder: Path) -> Path:
    target = folder / "native.so"
    sources = [str(source) for source in _SOURCES]
    failure = None
    for machine in _FOR_THIS_MACHINE:
        arguments = [*_OPTIONS, *machine, f"-I{jax.ffi.include_dir()}", *sources, "-lm"]
        try:
            subprocess.run(
                [*command, *arguments, "-o", str(target)],
                check=True,
                capture_output=True,
                text=True,
            )
            return target
        except subprocess.CalledProcessError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _fingerprint(command: list[str]) -> str:
    """Changes with everything on which the compiled code depends."""
    version = subprocess.run([*command, "--version"], check=True, capture_output=True).stdout
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
    try:
        return seal.read_text(encoding="ascii") == _digest(file)
    except OSError:
        return False


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
