"""Results as a table for people; the JSON holds the same numbers unrounded."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

_WIDTH = 160


def show(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints one table; the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        table.add_row(*row)
    Console(width=_WIDTH, markup=False).print(table)


def number(value: float | None, digits: int = 0) -> str:
    """``1,234.5``, or a dash where there is no value."""
    return "-" if value is None else f"{value:,.{digits}f}"


def times(value: float | None) -> str:
    """A ratio, such as ``31.2x``."""
    return "-" if value is None else f"{value:,.2f}x" if value < 10 else f"{value:,.1f}x"


def share(value: float | None) -> str:
    """A fraction in percent."""
    return "-" if value is None else f"{value:.1%}"
