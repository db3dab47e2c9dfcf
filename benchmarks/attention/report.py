"""The two variants, and lines of the table of six aspects."""

from collections.abc import Mapping
from typing import Any

from benchmarks import tables
from benchmarks.train_steps import load_config
from simplernn_jax.config import Config

VARIANTS = RECURRENCE, ATTENTION = "SimpleRNN", "attention"

Line = dict[str, Any]
"""A row of the first table: one quantity of both variants."""


def config_of(variant: str, length: int, batch: int = 1, **fields: Any) -> Config:
    """Configuration of a variant; both have the same number of parameters."""
    name = "base" if variant == RECURRENCE else "attention"
    return load_config(name, batch, length, attention_context=length, **fields)


def line(
    aspect: str,
    measured: str,
    values: Mapping[str, float | None],
    *,
    more_is_better: bool = False,
    tolerance: float | None = None,
    is_decisive: bool = True,
) -> Line:
    """A line with the better variant, unless one has no value or they are not decisive.

    Differences up to `tolerance` count as equal; None compares by ratio, up to 5 %.
    """
    row: Line = {"aspect": aspect, "measured": measured, **values, "better": ""}
    ours, theirs = (values[variant] for variant in VARIANTS)
    if ours is not None and theirs is not None and is_decisive:
        low, high = sorted((ours, theirs))
        row["better"] = RECURRENCE if (ours > theirs) == more_is_better else ATTENTION
        if high - low <= (0.05 * high if tolerance is None else tolerance):
            row["better"] = "equal"
        elif tolerance is None and low > 0:
            row["better"] += f", {tables.text_of(high / low)}x"
    return row


def with_lines(aspect: str, curves: Mapping[str, tables.Curves]) -> dict[str, Any]:
    """`curves`, with lines for the first and the last length of both variants."""
    lines = [
        line(aspect, f"{quantity}, T {int(n):,}", {v: each[v][n] for v in VARIANTS})
        for quantity, each in curves.items()
        for n in (min(each[ATTENTION], key=int), max(each[ATTENTION], key=int))
    ]
    return {"curves": curves, "lines": lines}
