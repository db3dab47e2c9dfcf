"""The machine of a measurement, and the rates that it reaches at best."""

import os
import platform
import re
import subprocess
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.measure import Call

_PACKAGES = ("jax", "flax", "optax", "numpy", "torch")
_SETTINGS = ("GLIBC_TUNABLES", "LD_PRELOAD", "XLA_FLAGS", "OMP_NUM_THREADS")
"""Environment variables that change speed or memory."""


class Ceiling(NamedTuple):
    """A matmul at the full speed of the machine."""

    call: Call
    flops: float
    """Floating point operations of one call."""


def describe() -> dict[str, Any]:
    """Device, processor, load average, versions, settings, and the commit."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    installed = {
        distribution.name.lower(): distribution.version for distribution in distributions()
    }
    return {
        "device": jax.devices()[0].device_kind,
        "processor": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: installed.get(name) for name in _PACKAGES},
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
        "commit": _commit(),
    }


def square_matmul(dtype: str, size: int = 2048) -> Ceiling:
    """``[size, size] x [size, size]`` in `dtype`, summed in float32."""
    left, right = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    return Ceiling(_matmul(left, right), 2.0 * size**3)


def batched_matmul(count: int, rows: int, inner: int, columns: int, dtype: str) -> Ceiling:
    """`count` matmuls ``[rows, inner] x [inner, columns]`` in `dtype`, summed in float32."""
    keys = jax.random.split(jax.random.key(0))
    left = jax.random.normal(keys[0], (count, rows, inner), dtype)
    right = jax.random.normal(keys[1], (count, inner, columns), dtype)
    return Ceiling(_matmul(left, right), 2.0 * count * rows * inner * columns)


def _matmul(left: jax.Array, right: jax.Array) -> Call:
    matmul = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    return lambda: matmul(left, right)


def _commit() -> str:
    """Hash of the commit, with ``-dirty`` if the working tree differs; empty without git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    folder = Path(__file__).parent
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    except FileNotFoundError:
        return ""
    return result.stdout.strip()
