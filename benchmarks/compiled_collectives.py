"""Collectives of a compiled program, read from its text."""

import math
import re
from collections import Counter

_OPERATION = re.compile(
    r" = (\(.*?\)|\S+) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
    r"|collective-broadcast)(?:-start)?\("
)
_ARRAY = re.compile(r"[a-z]+(\d*)(?:e\d\w*)?\[([\d,]*)\]")
"""``pred`` has no number of bits and takes a byte."""


def collectives(text: str) -> Counter[tuple[str, int]]:
    """``{(kind, bytes of the result on one device): count}``, array by array.

    XLA may combine several all-reduces into one operation: each array counts as one here. A
    collective in a loop counts once, however often the loop runs.
    """
    found: Counter[tuple[str, int]] = Counter()
    for arrays, kind in _OPERATION.findall(text):
        for bits, shape in _ARRAY.findall(arrays):
            size = math.prod(int(n) for n in shape.split(",") if n)
            found[kind, size * max(int(bits or 8), 8) // 8] += 1
    return found
