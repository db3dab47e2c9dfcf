"""The two variants, lines of the table of six aspects, and the report of all measurements."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from simplernn_jax.config import Config
from simplernn_jax.files import write_file

from .. import tables
from ..measure import describe_machine
from ..tables import Row
from ..train_steps import load_config

VARIANTS = RECURRENCE, ATTENTION = "SimpleRNN", "attention"

Measurement = Callable[[bool], dict[str, Any]]
"""A measurement, of small sizes if the argument is true. The result, which JSON can hold, has
``lines`` of the first table, and ``curves`` by quantity (over ``x``, or T) or ``rows`` of a table.
Its docstring is the text of the report."""
_FORMAT = 4
"""Format of results.json; others are refused."""
_INTRODUCTION = """# SimpleRNN and self-attention, measured

The same block, data, sizes and training for both variants: `configs/base.py` and
`configs/attention.py`, with the same number of parameters; attention sees the whole sequence. On
synthetic tasks, small models of the same kind, trained once at every learning rate; the one with
the lowest training loss is tested. The first table compares attention there with the recurrence
that has the same number of parameters.
"""


def config_of(variant: str, length: int, batch: int = 1, **fields: Any) -> Config:
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
    """A row of the first table: a quantity of both variants, and which is better if decisive.

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


def with_lines(aspect: str, curves: Mapping[str, tables.Curves]) -> dict[str, Any]:
    """`curves`, with lines for the first and the last length of both variants."""
    lines = [
        line(aspect, f"{quantity}, T {int(n):,}", {v: each[v][n] for v in VARIANTS})
        for quantity, each in curves.items()
        for n in (min(each[ATTENTION], key=int), max(each[ATTENTION], key=int))
    ]
    return {"curves": curves, "lines": lines}


def run(
    measurements: Mapping[str, Measurement], out: Path, quick: bool, names: Sequence[str]
) -> None:
    """Take the measurements `names`; write results, tables and pictures to `out` after each.

    The others are taken from the present results.json.

    Raises:
      UserError: the present results.json is not one of this benchmark.
    """
    path = out / "results.json"
    results = tables.read_results(path, _FORMAT, "results") if path.exists() else {}
    for name in names:
        print(f"measuring {name} ...", flush=True)
        measured = measurements[name](quick)
        text = inspect.getdoc(measurements[name])
        conditions = {"quick": quick, "machine": describe_machine()}
        results[name] = {"text": text, "measured": measured} | conditions
        content = json.dumps({"format": _FORMAT, "results": results}, indent=2)
        write_file(path, f"{content}\n".encode())
        first = report(out, {name: results[name] for name in measurements if name in results})
    print(f"{first}\nwritten: {out / 'table.md'}, its pictures, and results.json")


def report(out: Path, results: Mapping[str, Any]) -> str:
    """Write ``table.md`` and the pictures of all `results`; return the first table."""
    parts, conditions = [], []
    for name, result in results.items():
        measured = result["measured"]
        curves, x = measured.get("curves", {}), measured.get("x", "T")
        parts.append(f"## {name}\n\n{result['text']}\n")
        if curves:
            write_file(out / f"{name}.png", tables.draw(curves, x))
            parts.append(f"![{name}]({name}.png)\n")
        for quantity, each in curves.items():
            parts.append(f"{quantity}:\n\n{tables.markdown(tables.by_x(x, each))}")
        parts.append(tables.markdown(measured["rows"]) if "rows" in measured else "")
        machine = {key: result["machine"][key] for key in ("processor", "cores", "jax", "commit")}
        conditions.append({"measurement": name, "quick": result["quick"]} | machine)
    lines = [line for result in results.values() for line in result["measured"]["lines"]]
    first = tables.markdown(lines)
    page = [_INTRODUCTION, first, *parts, f"## conditions\n\n{tables.markdown(conditions)}"]
    write_file(out / "table.md", "\n".join(page).encode())
    return first
