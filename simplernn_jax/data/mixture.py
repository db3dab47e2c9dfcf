"""Mixtures of sources: ``a/:0.7,b.jsonl:0.3``."""

import math
import os
import re
from typing import NamedTuple

from simplernn_jax.errors import UserError

ENTRY = re.compile(r"(.+?):([^:,/]*)(?:,|$)", re.DOTALL)
"""A source up to ``:WEIGHT`` before a comma or the end; other commas and colons are its own."""


class WeightedSource(NamedTuple):
    """One source of a mixture."""

    source: str
    weight: float
    """Probability: the weight over the sum of all."""


def parse_mixture(source: str) -> list[WeightedSource] | None:
    """Parse ``data.source``; None if it is a single source, such as any path that exists.

    Raises:
      UserError: a source without a weight, a weight that is not a number from 0 up, or all are 0.
    """
    if "," not in source or "\0" in source or os.path.lexists(os.path.expanduser(source)):
        return None
    entries: list[re.Match[str]] = []
    # Not `finditer`: where no entry begins, none begins later, and it would try each character.
    while entry := ENTRY.match(source, entries[-1].end() if entries else 0):
        entries.append(entry)
    weights = [_number(entry[2]) for entry in entries]
    if all(weight is None for weight in weights):
        return None
    # Without a weight, a source at the end is left over and another one is part of the next.
    rest = source[entries[-1].end() :]
    if rest or len(entries) < 2:
        raise _error(source, f"no weight for {rest or source!r}")
    for entry, weight in zip(entries, weights, strict=True):
        if weight is None or not 0 <= weight < math.inf:
            raise _error(source, f"the weight {entry[2]!r} of {entry[1]} is not a number from 0 up")
    total = sum(weight for weight in weights if weight is not None)
    if not 0 < total < math.inf:
        raise _error(source, f"the sum of the weights is {total}")
    return [
        WeightedSource(entry[1], (weight or 0.0) / total)
        for entry, weight in zip(entries, weights, strict=True)
    ]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _error(source: str, problem: str) -> UserError:
    return UserError(
        f"--config.data.source={source}: {problem}; give each source of a mixture a weight, such "
        "as 'a/:0.7,b.jsonl:0.3'"
    )
