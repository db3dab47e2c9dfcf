"""Interleaved timing, functions in fresh processes, and the machine."""

import math
import os
import pickle
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import simplernn_jax
from simplernn_jax import project
from simplernn_jax.devices import available_cores
from simplernn_jax.errors import UserError

PACKAGES = Path(simplernn_jax.__file__).resolve().parents[1]
"""Folder that `simplernn_jax` is imported from."""
Call = Callable[[], Any]
"""Does the timed work once; the arrays of its result are waited for."""
Times = list[list[float]]
"""Seconds of every timed call of one candidate, per block."""
_CHILD = """
import pickle, sys
sys.path.insert(0, sys.argv[1])
from simplernn_jax.errors import UserError
output, sys.stdout = sys.stdout.buffer, sys.stderr
function, arguments = pickle.load(sys.stdin.buffer)
try:
    result = function(**arguments)
except UserError as error:
    result = error
pickle.dump(result, output)
"""


class Effort(NamedTuple):
    """Number of repetitions of every measurement."""

    blocks: int
    calls: int
    """Timed calls per candidate and block; one more before them is dropped."""


def alternate(candidates: Mapping[str, Call], effort: Effort) -> dict[str, Times]:
    """Time every candidate in every block, A B C A B C ..., after one warm-up call of each.

    Alternation exposes all candidates to the same disturbances of the machine.
    """
    for call in candidates.values():
        jax.block_until_ready(call())
    times: dict[str, Times] = {name: [] for name in candidates}
    for _ in range(effort.blocks):
        for name, call in candidates.items():
            times[name].append([seconds_of(call) for _ in range(effort.calls + 1)][1:])
    return times


def seconds_of(call: Call) -> float:
    """Wall time of one call, until its result is ready."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def median(blocks: Times) -> float:
    """Median over all calls of all blocks."""
    return statistics.median(seconds for block in blocks for seconds in block)


def block_ratio(slower: Times, faster: Times) -> float:
    """Median over blocks of the ratio of the blocks' medians."""
    return statistics.median(
        statistics.median(a) / statistics.median(b) for a, b in zip(slower, faster, strict=True)
    )


def call_isolated(
    function: Callable[..., Any], environment: Mapping[str, str] | None = None, **arguments: Any
) -> Any:
    """Result of `function`, of a module's top level, in a fresh process with these variables.

    Raises:
      UserError: `function` raised it.
      subprocess.CalledProcessError: the process failed otherwise; its traceback is on stderr.
    """
    output = subprocess.run(
        [sys.executable, "-P", "-c", _CHILD, str(PACKAGES)],
        env={**os.environ, **(environment or {})},
        input=pickle.dumps((function, arguments)),
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    result = pickle.loads(output)  # noqa: S301 - of our own child
    if isinstance(result, UserError):
        raise result
    return result


def on_simulated_devices(count: int, function: Callable[..., Any], **arguments: Any) -> Any:
    """`call_isolated` with `count` simulated CPU devices."""
    flags = f"--xla_force_host_platform_device_count={count}"
    return call_isolated(function, {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, **arguments)


def describe_machine() -> dict[str, Any]:
    """Device, processor, load average, versions, settings of speed and memory, and the commit."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    versions = {package.name.lower(): package.version for package in metadata.distributions()}
    settings = ("GLIBC_TUNABLES", "LD_PRELOAD", "XLA_FLAGS", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
    command = ["git", "-C", str(project.ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": jax.devices()[0].device_kind,
        "processor": model[1] if model else platform.processor(),
        "cores": available_cores(),
        "python": platform.python_version(),
        **{name: versions.get(name) for name in ("jax", "flax", "optax", "numpy", "torch")},
        "load_average": os.getloadavg()[0],
        "settings": {name: os.environ[name] for name in settings if name in os.environ},
        "commit": commit,
    }


def matmul(left: tuple[int, ...], right: tuple[int, ...], dtype: str) -> tuple[Call, float]:
    """Matmuls of arrays with these shapes, summed in float32, and their number of operations."""
    keys = jax.random.split(jax.random.key(0))
    operands = [jax.random.normal(*each, dtype) for each in zip(keys, (left, right), strict=True)]
    compiled = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    return lambda: compiled(*operands), 2.0 * math.prod(left) * right[-1]
