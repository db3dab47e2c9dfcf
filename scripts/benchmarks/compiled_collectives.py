"""What the devices of a compiled program tell each other, read from its text."""

import math
import re
from collections import Counter
from typing import Any

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_OPERATION = re.compile(rf" = (\(.*?\)|\S+) ({'|'.join(KINDS)}|collective-broadcast)(?:-start)?\(")
_ARRAY = re.compile(r"([a-z]+)(\d+)\[([\d,]*)\]")


def collectives(program: Any) -> Counter[tuple[str, int]]:
    """``{(kind, bytes of the result on one device): count}``, array by array.

    XLA puts several sums into one operation, and how many is its business: each array counts as
    one here.
    """
    found: Counter[tuple[str, int]] = Counter()
    for line in program.as_text().splitlines():
        operation = _OPERATION.search(line)
        if operation:
            for _, bits, shape in _ARRAY.findall(operation[1]):
                size = math.prod(int(n) for n in shape.split(",") if n)
                found[operation[2], size * max(int(bits), 8) // 8] += 1
    return found
