"""The report: one table of six aspects, then tables and pictures of every measurement."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import tables
from benchmarks.attention.variants import ATTENTION, RECURRENCE, VARIANTS
from benchmarks.tables import Curves
from simplernn_jax.files import write_file

ASPECTS = (
    "parallelism",
    "long-range dependency",
    "memory",
    "computation",
    "scalability",
    "interpretability",
)
_INTRODUCTION = """The same block, data, sizes and training for both variants: `configs/base.py` and
`configs/attention.py`, with the same number of parameters; attention sees the whole sequence. On
synthetic tasks, small models of the same kind, trained once at every learning rate; the one with
the lowest training loss is tested. The first table compares attention there with the recurrence
that has the same number of parameters."""

Results = Mapping[str, Any]
"""Results of a measurement, which JSON can hold: ``curves`` (`Curves` by quantity) and ``rows`` (a
table), or one of them."""


class Line(NamedTuple):
    """One quantity of both variants."""

    aspect: str
    measured: str
    values: Mapping[str, float | None]
    more_is_better: bool = False
    as_ratio: bool = True
    """Compare values by their ratio, otherwise by their difference."""
    tolerance: float = 0.05
    """Differences up to this, or to this fraction of the larger value, count as equal."""
    is_decisive: bool = True
    """Whether the values are enough to name a winner."""

    def verdict(self) -> str:
        """The better variant and its advantage; empty if only one has a value."""
        ours, theirs = (self.values[variant] for variant in VARIANTS)
        if ours is None or theirs is None or not self.is_decisive:
            return ""
        low, high = sorted((ours, theirs))
        if high - low <= self.tolerance * (high if self.as_ratio else 1):
            return "equal"
        better = RECURRENCE if (ours > theirs) == self.more_is_better else ATTENTION
        return f"{better}, {tables.text_of(high / low)}x" if self.as_ratio and low > 0 else better


def lines_at_ends(aspect: str, quantity: str, curves: Curves) -> list[Line]:
    """Lines for the first and the last length of both variants' curves."""
    lengths = list(curves[RECURRENCE])
    return [
        Line(aspect, f"{quantity}, T {int(length):,}", {v: curves[v][length] for v in VARIANTS})
        for length in dict.fromkeys((lengths[0], lengths[-1]))
    ]


def all_ends(aspect: str) -> Callable[[Results], Iterator[Line]]:
    """A function to lines at the ends of all curves."""

    def lines(results: Results) -> Iterator[Line]:
        for quantity, curves in results["curves"].items():
            yield from lines_at_ends(aspect, quantity, curves)

    return lines


class Measurement(NamedTuple):
    """A part of the comparison."""

    measure: Callable[..., dict[str, Any]]
    """Returns `Results`; its docstring is the text of the report."""
    lines: Callable[[Results], Iterable[Line]]
    """Lines of the first table."""
    quick: Mapping[str, Any]
    """Arguments of `measure` for small sizes."""
    full: Mapping[str, Any]
    x: str = "T"
    """Name of the x axis of all curves."""


def six_aspects(lines: Iterable[Line]) -> str:
    """The first table."""
    rows: list[dict[str, Any]] = []
    aspect = ""
    for line in sorted(lines, key=lambda line: ASPECTS.index(line.aspect)):
        first = line.aspect if line.aspect != aspect else ""
        aspect = line.aspect
        rows.append({"aspect": first, "measured": line.measured, **line.values})
        rows[-1]["better"] = line.verdict()
    return tables.markdown(rows)


def write(out: Path, results: Mapping[str, Any], measurements: Mapping[str, Measurement]) -> str:
    """Write ``table.md`` and the pictures of all `results`; return the first table."""
    parts = []
    lines: list[Line] = []
    for name, result in results.items():
        measurement, measured = measurements[name], result["measured"]
        lines += measurement.lines(measured)
        parts.append(f"## {name}\n\n{inspect.getdoc(measurement.measure)}\n")
        curves = measured.get("curves", {})
        if curves:
            write_file(str(out / f"{name}.png"), tables.draw(curves, measurement.x))
            parts.append(f"![{name}]({name}.png)\n")
        for quantity, each in curves.items():
            parts.append(f"{quantity}:\n\n{tables.markdown(tables.by_x(measurement.x, each))}")
        if "rows" in measured:
            parts.append(tables.markdown(measured["rows"]))
    first = six_aspects(lines)
    conditions = [
        {"measurement": name, "sizes": "quick" if result["quick"] else "full"}
        | {"seconds": result["seconds"]}
        | {key: result["machine"][key] for key in ("processor", "cores", "jax", "commit")}
        for name, result in results.items()
    ]
    page = [f"# SimpleRNN and self-attention, measured\n\n{_INTRODUCTION}\n\n{first}", *parts]
    page.append(f"## conditions\n\n{tables.markdown(conditions)}")
    write_file(str(out / "table.md"), "\n".join(page).encode("utf-8"))
    return first
