"""What the numbers were measured on, and how fast that machine is at best."""

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.interleave import Call, Effort, alternate, median

_VERSIONS = ("jax", "flax", "optax", "numpy", "torch")
_SETTINGS = ("GLIBC_TUNABLES", "LD_PRELOAD", "XLA_FLAGS", "OMP_NUM_THREADS")
"""Variables of the environment that change what is measured."""


class Ceiling(NamedTuple):
    """Work that a machine does as fast as it can."""

    call: Call
    amount: float
    """Floating point operations, or bytes, of one call."""


def describe() -> dict[str, Any]:
    """Device, processor, load before it began, versions, settings, and the commit."""
    return {
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _VERSIONS},
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
        "commit": _commit(),
    }


def square_product(dtype: str, size: int = 2048) -> Ceiling:
    """``[size, size] x [size, size]`` in `dtype`, summed in float32."""
    left, right = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    return Ceiling(_product(left, right), 2.0 * size**3)


def batched_product(count: int, rows: int, inner: int, columns: int, dtype: str) -> Ceiling:
    """`count` products ``[rows, inner] x [inner, columns]`` in `dtype`, summed in float32."""
    keys = jax.random.split(jax.random.key(0))
    left = jax.random.normal(keys[0], (count, rows, inner), dtype)
    right = jax.random.normal(keys[1], (count, inner, columns), dtype)
    return Ceiling(_product(left, right), 2.0 * count * rows * inner * columns)


def memory_copy(num_bytes: int = 2**28) -> Ceiling:
    """Reads `num_bytes` and writes as many; both count."""
    # A sum, because a compiled plain copy of an argument may be no copy.
    add = jax.jit(lambda x: x + 1)
    x = jnp.zeros(num_bytes // 4, jnp.float32)
    return Ceiling(lambda: add(x), 2.0 * num_bytes)


def measure_ceilings(effort: Effort, size: int = 2048, num_bytes: int = 2**28) -> dict[str, float]:
    """Rates of this machine in this run: GFLOP/s of matrix products, GB/s of a copy."""
    ceilings = {}
    for dtype in ("float32", "bfloat16"):
        ceilings[f"square_{dtype}_gflops"] = square_product(dtype, size)
        ceilings[f"batched_{dtype}_gflops"] = batched_product(size // 4, 64, 128, 128, dtype)
    ceilings["copy_gb_per_s"] = memory_copy(num_bytes)
    times = alternate({name: ceiling.call for name, ceiling in ceilings.items()}, effort)
    return {name: ceiling.amount / median(times[name]) / 1e9 for name, ceiling in ceilings.items()}


def say_ceilings(ceilings: Mapping[str, float]) -> str:
    """One line for the foot of a table."""
    rates = [
        f"{kind} {dtype} {ceilings[f'{kind}_{dtype}_gflops']:,.0f} GFLOP/s"
        for kind in ("square", "batched")
        for dtype in ("float32", "bfloat16")
    ]
    return f"ceilings: {', '.join(rates)}; copy {ceilings['copy_gb_per_s']:,.1f} GB/s"


def _product(left: jax.Array, right: jax.Array) -> Call:
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    return lambda: product(left, right)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The short hash of the commit, with ``+changes`` if the working tree differs from it."""
    hash_, changes = _git("rev-parse", "--short", "HEAD"), _git("status", "--porcelain")
    return f"{hash_}+changes" if changes else hash_


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    folder = Path(__file__).parent
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    except FileNotFoundError:  # no git here; the source may have come without its history
        return ""
    return result.stdout.strip()
