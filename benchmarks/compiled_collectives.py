"""Collectives of a compiled program, read from its text."""

import math
import re
from collections import Counter
from typing import Any

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_OPERATION = re.compile(rf" = (\(.*?\)|\S+) ({'|'.join(KINDS)}|collective-broadcast)(?:-start)?\(")
_ARRAY = re.compile(r"[a-z]+(\d*)(?:e\d\w*)?\[([\d,]*)\]")
"""``pred`` has no number of bits and takes a byte."""
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")


def collectives(program: Any, *, in_loops: bool = False) -> Counter[tuple[str, int]]:
    """``{(kind, bytes of the result on one device): count}``, array by array.

    XLA may combine several all-reduces into one operation: each array counts as one here. A
    collective in a loop counts once, however often the loop runs.

    Args:
      program: compiled.
      in_loops: count only collectives in loops.
    """
    found: Counter[tuple[str, int]] = Counter()
    computations = _computations(program.as_text())
    inside = _inside_loops(computations)
    for name, lines in computations.items():
        if in_loops and name not in inside:
            continue
        for operation in filter(None, map(_OPERATION.search, lines)):
            for bits, shape in _ARRAY.findall(operation[1]):
                size = math.prod(int(n) for n in shape.split(",") if n)
                found[operation[2], size * max(int(bits or 8), 8) // 8] += 1
    return found


def _computations(text: str) -> dict[str, list[str]]:
    """Lines of each computation of a program, by name."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            lines = found[head[1]] = []
        else:
            lines.append(line)
    return found


def _inside_loops(computations: dict[str, list[str]]) -> set[str]:
    """Names of the bodies of loops, and of all computations that they call."""
    mentions = {
        name: set(re.findall(r"[\w.-]+", " ".join(lines))) for name, lines in computations.items()
    }
    text = " ".join(line for lines in computations.values() for line in lines)
    inside: set[str] = set()
    new = set(re.findall(r"body=%?([\w.-]+)", text))
    while new:
        inside |= new
        new = {name for one in new for name in mentions[one] & computations.keys()} - inside
    return inside
