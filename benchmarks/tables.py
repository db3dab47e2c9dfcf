"""Tables in Markdown, pictures of curves, and the folder of results."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from simplernn_jax.analysis.plots import add_legend, line_styles, new_figure, png
from simplernn_jax.errors import UserError
from simplernn_jax.files import check_output, write_file

from .measure import describe_machine

Row = dict[str, Any]
"""Cells by heading; JSON can hold it."""
Curves = Mapping[str, Mapping[str, float]]
"""Curves by label: y by x; x is text, as JSON keeps it."""


class Table(NamedTuple):
    """Rows, or curves in panels, which are shown as a table each; JSON can hold it."""

    title: str
    rows: Sequence[Row] = ()
    panels: Mapping[str, Curves] = {}
    x: str = ""
    """Heading of x, the same in all panels."""
    picture: str = ""
    """Name of the file of the panels, without its suffix."""
    text: str = ""
    data: Mapping[str, Any] = {}
    """What else ``results.json`` keeps."""
    machine: Mapping[str, Any] = {}
    """`describe_machine`, when the table was added to results."""

    def markdown(self) -> str:
        """Text and tables."""
        parts = [f"{self.text}\n"] if self.text else []
        parts += [markdown(self.rows)] if self.rows else []
        if not self.rows:
            parts += [f"{y}:\n\n{markdown(by_x(self.x, c))}" for y, c in self.panels.items()]
        return "\n".join(parts)


class Results:
    """Tables in a folder, if there is one, where the tables of earlier runs stay.

    Raises:
      UserError: ``results.json`` of the folder is something else.
    """

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.tables: dict[str, Table] = {}
        if out is None:
            return
        out.mkdir(parents=True, exist_ok=True)
        path = out / "results.json"
        check_output(path)  # before minutes of work
        if path.exists():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))["tables"]
                self.tables = {table["title"]: Table(**table) for table in content}
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}: not results of this program; remove it, or name another --out"
                ) from error

    def add(self, table: Table) -> None:
        """Print a table, and write it in the place of one with the same title."""
        print(f"\n{table.title}\n\n{table.markdown()}", flush=True)
        self.tables[table.title] = table._replace(machine=describe_machine())
        if self.out is None:
            return
        content = [each._asdict() for each in self.tables.values()]
        text = json.dumps({"tables": content}, indent=2)
        write_file(self.out / "results.json", f"{text}\n".encode())
        if table.picture and table.panels:
            write_file(self.out / f"{table.picture}.png", draw(table.panels, table.x))
        parts = []
        for title, each in self.tables.items():
            picture = f"![{title}]({each.picture}.png)\n\n" if each.picture else ""
            parts.append(f"## {title}\n\n{picture}{each.markdown()}")
        write_file(self.out / "table.md", "\n".join(parts).encode())


def text_of(value: Any) -> str:
    """Text of a cell: a number with three digits or more, a dash for None."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    size = abs(value)
    if size == 0 or 1e-4 <= size < 1e15:
        digits = 0 if size >= 100 else 1 if size >= 10 else 3 if size >= 1 else 4
        return f"{value:,.{digits}f}"
    return f"{value:.1e}"


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table; the keys are its headings, in order of appearance."""
    headings = list(dict.fromkeys(heading for row in rows for heading in row))
    cells = [[text_of(row.get(heading, "")) for heading in headings] for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    lines = [headings, ["-" * width for width in widths], *cells]
    return "".join(f"| {' | '.join(map(str.ljust, line, widths))} |\n" for line in lines)


def curves_of(
    labels: Iterable[str], lengths: Sequence[int], value: Callable[[str, int], float]
) -> dict[str, dict[str, float]]:
    """`Curves` of ``value(label, length)``."""
    return {label: {str(n): value(label, n) for n in lengths} for label in labels}


def by_x(x: str, curves: Curves) -> list[Row]:
    """Rows of a table of curves: the value of every curve at each x."""
    points = dict.fromkeys(point for curve in curves.values() for point in curve)
    return [
        {x: int(point)} | {label: curve.get(point) for label, curve in curves.items()}
        for point in points
    ]


def draw(panels: Mapping[str, Curves], x: str) -> bytes:
    """A PNG file with curves by title against `x`; a label looks the same in all panels.

    The x axis is logarithmic, and the y axis too unless all values are fractions or of one order of
    magnitude.
    """
    from matplotlib import ticker

    labels = list(dict.fromkeys(label for curves in panels.values() for label in curves))
    styles = dict(zip(labels, line_styles(len(labels), 1), strict=True))
    columns = min(len(panels), 2 if len(panels) == 4 else 3)
    rows = -(-len(panels) // columns)
    with new_figure(max(4 * columns, 5.8), 3.5 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        for axes, (title, curves) in zip(grid, panels.items(), strict=False):
            for label, curve in curves.items():
                axes.plot(list(map(int, curve)), curve.values(), label=label, **styles[label])
            ticks = sorted({int(x) for curve in curves.values() for x in curve})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{x:,}" if x < 10_000 else f"{x / 1e3:.3g}k" for x in ticks])
            axes.xaxis.minorticks_off()
            axes.set(title=title, xlabel=x)
            axes.grid(axis="y")
            values = [y for curve in curves.values() for y in curve.values()]
            top = max(1, *values)
            if top <= max(1, 10 * min(values)):
                bottom = min(values) if min(values) < top <= 2 * min(values) else 0.0
                margin = 0.03 * (top - bottom)
                axes.set_ylim(bottom - margin, top + margin)
                axes.yaxis.set_major_formatter("{x:,g}")
                continue
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:,g}")
            axes.yaxis.set_minor_locator(ticker.NullLocator())
        if len(labels) > 1:
            add_legend(figure, grid[0])
        return png(figure)
