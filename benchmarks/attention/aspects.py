"""The two variants, and the table that compares them."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from simplernn_jax.config import Config

from .. import tables
from ..tables import Curves, Row, Table
from ..train_steps import load_config

VARIANTS = RECURRENCE, ATTENTION = "SimpleRNN", "attention"
_TEXT = """The same block, data, sizes and training for both variants: `configs/base.py` and
`configs/attention.py`, with the same number of parameters; attention sees the whole sequence. On
synthetic tasks, small models of the same kind, trained once at every learning rate; the one with
the lowest training loss is tested. This table compares attention there with the recurrence that has
the same number of parameters."""


class Measured(NamedTuple):
    """Result of a measurement."""

    lines: list[Row]
    """Rows of the table of all aspects, by `line`."""
    curves: Mapping[str, Curves] = {}
    x: str = "T"
    rows: Sequence[Row] = ()
    """Rows of a table of models."""


Measurement = Callable[[bool], Measured]
"""A measurement, of small sizes if the argument is true. Its docstring explains its table."""


def run(
    measurements: Mapping[str, Measurement],
    names: Sequence[str],
    quick: bool,
    kept: Mapping[str, Table],
) -> Iterator[Table]:
    """Tables of the measurements `names`, and one of all aspects, also of the tables in `kept`."""
    lines: dict[str, Sequence[Row]] = {}
    for name, measure in measurements.items():
        title = f"attention: {name}"
        if name in names:
            print(f"measuring {name} ...", flush=True)
            found = measure(quick)
            text = f"{inspect.getdoc(measure)}{' Small sizes.' * quick}"
            lines[name] = found.lines
            data = {"lines": found.lines}
            yield Table(title, (), found.curves, found.x, name * bool(found.curves), text, data)
            if found.rows:
                yield Table(f"{title}, models", found.rows)
        elif title in kept:
            lines[name] = kept[title].data["lines"]
    yield Table(
        "attention: six aspects", [row for each in lines.values() for row in each], text=_TEXT
    )


def config_of(variant: str, length: int, batch: int = 1, **fields: object) -> Config:
    """Configuration of a variant; both have the same number of parameters."""
    name = "base" if variant == RECURRENCE else "attention"
    return load_config(name, batch, length, mixer_options={"context": length}, **fields)


def line(
    aspect: str,
    measured: str,
    values: Mapping[str, float | None],
    *,
    more_is_better: bool = False,
    tolerance: float | None = None,
    is_decisive: bool = True,
) -> Row:
    """A quantity of both variants, and which is better if decisive.

    Differences up to `tolerance` count as equal; None compares by ratio, up to 5 %.
    """
    row: Row = {"aspect": aspect, "measured": measured, **values, "better": ""}
    ours, theirs = (values[variant] for variant in VARIANTS)
    if ours is not None and theirs is not None and is_decisive:
        low, high = sorted((ours, theirs))
        row["better"] = RECURRENCE if (ours > theirs) == more_is_better else ATTENTION
        if high - low <= (0.05 * high if tolerance is None else tolerance):
            row["better"] = "equal"
        elif tolerance is None and low > 0:
            row["better"] += f", {tables.text_of(high / low)}x"
    return row


def lines_of(aspect: str, curves: Mapping[str, Curves]) -> list[Row]:
    """Lines for the first and the last length of both variants."""
    return [
        line(aspect, f"{quantity}, T {int(n):,}", {v: each[v][n] for v in VARIANTS})
        for quantity, each in curves.items()
        for n in (min(each[ATTENTION], key=int), max(each[ATTENTION], key=int))
    ]
