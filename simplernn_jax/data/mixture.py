"""Mixtures of sources: ``a/:0.7,b.jsonl:0.3``."""

import math
import os

from simplernn_jax.errors import UserError


def split_mixture(source: str) -> list[tuple[str, str]]:
    """Split ``data.source`` into sources and their weights; empty if it is a single source.

    A source goes up to ``:NUMBER`` before a comma or the end; other commas and colons belong to it.
    Any path that exists is a single source.

    Raises:
      UserError: a source has no weight.
    """
    if "," not in source or "\0" in source or os.path.lexists(os.path.expanduser(source)):
        return []
    entries: list[tuple[str, str]] = []
    pending: list[str] = []
    for part in source.split(","):
        name, _, weight = part.rpartition(":")
        is_end = bool(name) and _is_number(weight)
        pending.append(name if is_end else part)
        if is_end:
            entries.append((",".join(pending), weight))
            pending = []
    if entries and (pending or len(entries) < 2):
        raise _error(source, f"no weight for {','.join(pending) or source}")
    return entries


def parse_mixture(source: str) -> list[tuple[str, float]] | None:
    """Return the sources of a mixture and their probabilities; None if it is a single source.

    Raises:
      UserError: a source has no weight, one is negative or not finite, or all are 0.
    """
    weights = [(name, float(weight)) for name, weight in split_mixture(source)]
    total = sum(weight for _, weight in weights)
    if any(not 0 <= weight < math.inf for _, weight in weights):
        raise _error(source, "a weight is negative or not finite")
    if weights and not 0 < total < math.inf:
        raise _error(source, f"the sum of the weights is {total}")
    return [(name, weight / total) for name, weight in weights] or None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _error(source: str, problem: str) -> UserError:
    return UserError(
        f"config.data.source={source}: {problem}; give each source of a mixture a weight, such "
        "as 'a/:0.7,b.jsonl:0.3'"
    )
