"""Candidates take turns on one machine, so that what disturbs one disturbs them all."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

Call = Callable[[], Any]
"""Does the work that is timed, once; the arrays of its result are waited for."""

Times = list[list[float]]
"""Seconds of every timed call of one candidate, per block."""


class Effort(NamedTuple):
    """How often everything is measured."""

    blocks: int
    calls: int
    """Timed calls per candidate and block; one more before them is dropped."""


def alternate(candidates: Mapping[str, Call], effort: Effort) -> dict[str, Times]:
    """Times every candidate in every block, A B C A B C ..., after one call of each to warm up."""
    times: dict[str, Times] = {name: [] for name in candidates}
    for call in candidates.values():
        jax.block_until_ready(call())
    for _ in range(effort.blocks):
        for name, call in candidates.items():
            block = [seconds_of(call) for _ in range(effort.calls + 1)]
            times[name].append(block[1:])
    return times


def seconds_of(call: Call) -> float:
    """Wall time of one call, until its result is there."""
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
