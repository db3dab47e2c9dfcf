"""What the devices of a compiled program tell each other, read from its text."""

import re

_COLLECTIVE = re.compile(
    r"= (?P<shapes>.*?) (?P<kind>all-reduce|all-gather|all-to-all|reduce-scatter|"
    r"collective-permute|collective-broadcast|ragged-all-to-all)(-start)?\("
)
_SHAPE = re.compile(r"[a-z]+\d*\[[\d,]*\]")


def collectives(compiled):
    """``(kind, shape of what each device gets)`` of each array sent, sorted.

    Arrays without axes are left out; what stands in a loop is listed once.
    """
    found = []
    for line in compiled.as_text().splitlines():
        if match := _COLLECTIVE.search(line):
            shapes = _SHAPE.findall(match["shapes"])
            found += [(match["kind"], shape) for shape in shapes if not shape.endswith("[]")]
    return sorted(found)
