"""C functions of the folder `cpu`: compiled on first use, cached, and registered with XLA.

Compiling on the user's machine uses all its vector instructions. Without a compiler, slower JAX
code computes the same.
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
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from simplernn_jax.errors import one_line
from simplernn_jax.files import cache_folder, check_owner
from simplernn_jax.ops.primitive import is_static, on_one_device, vary_like


def processor_lines() -> list[str]:
    """Return the lines of /proc/cpuinfo, if any, that identify the instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    kinds = ("vendor_id", "model", "flags", "Features", "CPU part")
    return sorted({line for line in lines if line.startswith(kinds)})


@functools.cache
def has_fast_bfloat16() -> bool:
    """Return whether XLA multiplies bfloat16 faster than float32 on this CPU.

    It does with AMX, and with AVX-512 BF16 on AMD (measured on Zen 5: 1.4 times the tokens/s). On
    Intel, AVX-512 BF16 alone is no faster than float32, and conversions come on top.
    """
    words = set(" ".join(processor_lines()).split())
    return "amx_bf16" in words or {"AuthenticAMD", "avx512_bf16"} <= words


MIN_ELEMENTS = 1 << 14
"""Minimum size of an array for which a C function is faster than XLA's loops: FFI call overhead is
about 5 us."""

FUNCTIONS = (
    "simplernn_forward",
    "simplernn_backward",
    "simplernn_convolution_forward",
    "simplernn_convolution_backward",
    "simplernn_norm_forward",
    "simplernn_norm_backward",
    "simplernn_newton_schulz",
    "simplernn_decode",
)
BFLOAT16_FUNCTIONS = ("simplernn_dense_forward", "simplernn_dense_backward")
"""Compiled where `has_fast_bfloat16`."""
_FOLDER = Path(__file__).with_name("cpu")
_OPTIONS = ("-O3", "-std=c11", "-ffp-contract=fast", "-fno-trapping-math", "-shared", "-fPIC")
"""Without ``-fno-trapping-math``, gcc does not vectorize loops with comparisons of floats."""
_MACHINE_OPTIONS = (
    ("-march=native", "-mprefer-vector-width=512"),
    ("-march=native",),
    ("-mcpu=native",),
    (),
)
"""Tried in this order: compilers and processors support different ones. By default, gcc uses half
of the registers of a processor with AVX-512."""
_LOCK = threading.Lock()
"""Held while compiling: threads that trace programs at the same time compile and load once."""

COMPILER_SECONDS = 300
"""Timeout of the compiler, which takes a few seconds."""


def call_native(
    name: str, results: Sequence[jax.Array | jax.ShapeDtypeStruct], *arguments: jax.Array
) -> Sequence[jax.Array]:
    """Call a C function, whose results have the shapes and dtypes of `results`."""
    like = jax.typeof(arguments[0])
    types = []
    for x in results:  # inside `shard_map` they vary like the arguments
        sharding = NamedSharding(like.sharding.mesh, P(*[None] * len(x.shape)))
        types.append(like.update(shape=x.shape, dtype=x.dtype, weak_type=False, sharding=sharding))
    return jax.ffi.ffi_call(name, types, vmap_method="broadcast_all")(*arguments)


def or_empty(flags: jax.Array | None, like: jax.Array) -> jax.Array:
    """Replace None by an empty array of bool, since C functions have no optional arguments."""
    return vary_like(jnp.zeros((0,), bool), like) if flags is None else flags


def supports_native(dtype: Any) -> bool:
    """Return whether C functions support `dtype` and this machine: float32, a CPU, a C compiler."""
    return dtype == jnp.float32 and jax.default_backend() == "cpu" and has_native_functions()


def use_native(x: jax.Array) -> bool:
    """Return whether to call a C function for `x`: by its size, and only if it is not sharded."""
    is_large = is_static(x.shape) and x.size >= MIN_ELEMENTS
    return is_large and on_one_device() and supports_native(x.dtype)


def has_native_functions() -> bool:
    """Return whether XLA can call the C functions on the CPU; compiles them at the first call.

    Thread-safe. The library is cached in the user's cache folder under a hash of source, compiler
    and processor. If it cannot be compiled or loaded, one warning says why.
    """
    return bool(_native_functions())


def has_native_bfloat16() -> bool:
    """Return whether there are C functions that multiply bfloat16: where that is fast."""
    return BFLOAT16_FUNCTIONS[0] in _native_functions()


def _native_functions() -> tuple[str, ...]:
    with _LOCK:
        return _register_functions()


@functools.cache
def _register_functions() -> tuple[str, ...]:
    """Return the names of the registered functions."""
    try:
        command = _compiler()
        if shutil.which(command[0]) is None:
            logging.warning(
                "no C compiler (%s): training on a CPU is about 2x slower; install one "
                "(Debian: apt install gcc; macOS: xcode-select --install) or set CC",
                command[0],
            )
            return ()
        library = _load(command)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        printed = getattr(error, "output", None) or b""
        reason = printed.decode(errors="replace").strip() or str(error)
        logging.warning("the C kernels could not be compiled: %s", one_line(reason))
        return ()
    names = (*FUNCTIONS, *(name for name in BFLOAT16_FUNCTIONS if hasattr(library, name)))
    for name in names:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return names


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CC", "")) or ["cc"]


def _load(command: list[str]) -> ctypes.CDLL:
    name = f"{native_fingerprint()}.so"
    try:
        folder = cache_folder("native")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # its files will be executed
        check_owner(os.stat(folder), folder)
        if not (folder / name).exists():
            with tempfile.TemporaryDirectory(dir=folder) as work:
                os.replace(_compile(command, Path(work)), folder / name)
        return ctypes.CDLL(str(folder / name))
    except (OSError, RuntimeError) as error:
        logging.info("compiled code is not cached: %s", error)
    # A loaded library does not need its file.
    with tempfile.TemporaryDirectory() as work:
        return ctypes.CDLL(str(_compile(command, Path(work))))


def _options() -> tuple[str, ...]:
    return (*_OPTIONS, *(["-DFAST_BFLOAT16"] if has_fast_bfloat16() else []))


def _compile(command: list[str], folder: Path) -> Path:
    target, failures = folder / "native.so", []
    for machine in _MACHINE_OPTIONS:
        arguments = [*_options(), *machine, f"-I{jax.ffi.include_dir()}", *_files("c"), "-lm"]
        try:
            _run([*command, *map(str, arguments), "-o", str(target)])
            return target
        except subprocess.CalledProcessError as error:
            failures.append(error)
            logging.info("the C kernels could not be compiled with %s", machine)
    raise failures[0]


def _files(suffix: str) -> list[Path]:
    return sorted(_FOLDER.glob(f"*.{suffix}"))


def _run(arguments: list[str]) -> bytes:
    """Run a compiler and return its output, which may be of any encoding."""
    return subprocess.run(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=COMPILER_SECONDS,
        check=True,
    ).stdout


def native_fingerprint() -> str:
    """Hash all that the compiled code depends on: sources, compiler and processor."""
    command = _compiler()
    digest = hashlib.sha256(_run([*command, "--version"]))
    headers = sorted(Path(jax.ffi.include_dir()).rglob("*.h"))
    for file in (*_files("c"), *_files("h"), *headers):
        digest.update(file.read_bytes())
    options = (*_options(), *map(str, _MACHINE_OPTIONS))
    for text in (*command, *options, platform.machine(), platform.processor(), *processor_lines()):
        digest.update(os.fsencode(text) + b"\n")
    return digest.hexdigest()[:32]
