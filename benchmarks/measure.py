"""Interleaved timing, functions in fresh processes, and peak memory."""

import ctypes
import gc
import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

Call = Callable[[], Any]
"""Does the timed work once; the arrays of its result are waited for."""

Times = list[list[float]]
"""Seconds of every timed call of one candidate, per block."""

_RESULT = "result: "
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CLEAR_PEAK = "5"


class Effort(NamedTuple):
    """Number of repetitions of every measurement."""

    blocks: int
    calls: int
    """Timed calls per candidate and block; one more before them is dropped."""


def alternate(candidates: Mapping[str, Call], effort: Effort) -> dict[str, Times]:
    """Time every candidate in every block, A B C A B C ..., after one warm-up call of each.

    Alternation exposes all candidates to the same disturbances of the machine.
    """
    times: dict[str, Times] = {name: [] for name in candidates}
    for call in candidates.values():
        jax.block_until_ready(call())
    for _ in range(effort.blocks):
        for name, call in candidates.items():
            block = [seconds_of(call) for _ in range(effort.calls + 1)]
            times[name].append(block[1:])
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
    """Result of `function` in a fresh interpreter.

    Args:
      function: of a module's top level.
      environment: variables set besides those of this process.
      arguments: of the function; they and its result must survive JSON.

    Raises:
      RuntimeError: it failed there; the message ends with its stderr.
    """
    module, name = function.__module__, function.__name__
    code = f"from {__name__} import answer; answer({module!r}, {name!r})"
    output = run_python(code, environment, json.dumps(arguments))
    return json.loads(output.rpartition(_RESULT)[2])


def on_simulated_devices(count: int, function: Callable[..., Any], **arguments: Any) -> Any:
    """`call_isolated` with `count` simulated CPU devices."""
    flags = f"--xla_force_host_platform_device_count={count}"
    return call_isolated(function, {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, **arguments)


def run_python(
    code: str, environment: Mapping[str, str] | None = None, standard_input: str = ""
) -> str:
    """Standard output of ``python -c code`` with the same import path.

    Raises:
      RuntimeError: its exit code is not 0.
    """
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(
        [sys.executable, "-c", code],
        input=standard_input,
        env={**os.environ, **path, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"exit code {result.returncode} of {code!r}:\n{result.stderr}")
    return result.stdout


def answer(module: str, name: str) -> None:
    """Child side of `call_isolated`: arguments on standard input, the result on output."""
    function = getattr(importlib.import_module(module), name)
    print(_RESULT + json.dumps(function(**json.load(sys.stdin))), flush=True)


def jax_peak(work: Callable[[], Any]) -> float | None:
    """Peak memory of compiled JAX `work` over the memory held before it, in bytes.

    Resident memory of the process on a CPU (None without ``/proc``), JAX's allocations since its
    start on a GPU; so call this in a fresh process.
    """

    def wait() -> None:
        jax.block_until_ready(work())

    device = jax.local_devices()[0]
    before = device.memory_stats()
    if before is None:
        return process_peak(wait)
    wait()
    return device.memory_stats()["peak_bytes_in_use"] - before["bytes_in_use"]


def process_peak(work: Callable[[], Any]) -> float | None:
    """Peak of the resident memory of this process during `work`, over that before it."""
    if not _CLEAR.exists():
        work()
        return None
    gc.collect()
    # Otherwise memory that compilation has freed would be reused, unseen.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)
    _CLEAR.write_text(_CLEAR_PEAK, encoding="ascii")
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{_STATUS} has no line {field}")
    return float(found[1]) * 1024
