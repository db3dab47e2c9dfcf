"""Run the measurements and report them: six aspects, then tables and pictures of each."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.attention import corpus, resources, synthetic
from benchmarks.measure import describe_machine
from simplernn_jax.errors import UserError
from simplernn_jax.files import write_file

MEASUREMENTS: Mapping[str, Callable[[bool], dict[str, Any]]] = {
    "parallelism": resources.measure_parallelism,
    "recall": synthetic.measure_recall,
    "distance": synthetic.measure_distance,
    "memory": resources.measure_memory,
    "cost": resources.measure_cost,
    "communication": resources.measure_communication,
    "corpus": corpus.measure_corpus,
    "interpretability": corpus.measure_interpretability,
}
"""In the order of their aspects in the table. The argument asks for small sizes; the result, which
JSON can hold, has ``lines`` of the first table, and ``curves`` by quantity (over ``x``, or T) or
``rows`` of a table. The docstring is the text of the report."""
_FORMAT = 4
"""Of results.json; others are refused."""
_INTRODUCTION = """# SimpleRNN and self-attention, measured

The same block, data, sizes and training for both variants: `configs/base.py` and
`configs/attention.py`, with the same number of parameters; attention sees the whole sequence. On
synthetic tasks, small models of the same kind, trained once at every learning rate; the one with
the lowest training loss is tested. The first table compares attention there with the recurrence
that has the same number of parameters.
"""


def run(out: Path, quick: bool, names: Sequence[str]) -> None:
    """Measure `names`; write results.json, table.md and the pictures to `out` after each.

    Other measurements are taken from the present results.json.

    Raises:
      UserError: the present results.json is not one of this benchmark.
    """
    path = out / "results.json"
    results = _read(path)
    for name in names:
        print(f"measuring {name} ...", flush=True)
        measured = MEASUREMENTS[name](quick)
        results[name] = {"measured": measured, "quick": quick, "machine": describe_machine()}
        content = json.dumps({"format": _FORMAT, "results": results}, indent=2)
        write_file(path, f"{content}\n".encode())
        first = report(out, {name: results[name] for name in MEASUREMENTS if name in results})
    print(f"{first}\nwritten: {out / 'table.md'}, its pictures, and results.json")


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    advice = "remove it, or name another --out"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); {advice}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise UserError(f"{path}: not results of this benchmark; {advice}")
    return content["results"]


def report(out: Path, results: Mapping[str, Any]) -> str:
    """Write ``table.md`` and the pictures of all `results`; return the first table."""
    parts, conditions = [], []
    for name, result in results.items():
        measured = result["measured"]
        curves, x = measured.get("curves", {}), measured.get("x", "T")
        parts.append(f"## {name}\n\n{inspect.getdoc(MEASUREMENTS[name])}\n")
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
