"""HTML that needs nothing else: pictures inside, no script, readable offline."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from simplernn_jax.analysis.token_text import Unit, visible

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto;
  max-width: 1364px; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0.3rem; }
h2 { font-size: 1.3rem; margin-top: 3rem; border-bottom: 1px solid #ccc; }
p { max-width: 60rem; }
figure { margin: 1.5rem 0; overflow-x: auto; }
figure img { display: block; max-width: 100%; }
figcaption { max-width: 60rem; color: #444; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: 0.2rem 0.9rem 0.2rem 0; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, .words td { text-align: left; }
pre { font: 14px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  background: #fff; border: 1px solid #ddd; padding: 0.6rem 0.8rem; margin: 0.4rem 0; }
.mark { outline: 2px solid #000; font-weight: bold; }
"""


_STRONGEST = 0.7
"""Opacity behind a word: what stands on it must stay readable."""


def document(title: str, parts: Iterable[str]) -> str:
    """A whole HTML document of `parts`, each HTML already."""
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def heading(text: str) -> str:
    """The title of a section."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    """Plain words."""
    return f"<p>{html.escape(text)}</p>"


def facts_list(facts: Mapping[str, str]) -> str:
    """Names and what goes with them, line by line."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(fact)}</td></tr>"
        for name, fact in facts.items()
    )
    return f'<table class="words">{rows}</table>'


def table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns under their names."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_LEAST_SHRUNK = 0.75
"""A picture shrinks with the page to this share of its width; then the page scrolls over it."""


def figure(png: bytes, title: str, how_to_read: str) -> str:
    """The picture, embedded, and the sentence that says how to read it."""
    data = base64.b64encode(png).decode("ascii")
    width = int.from_bytes(png[16:20], "big")  # a PNG file says so in its 17th byte and on
    title = html.escape(title)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{title}" '
        f'style="min-width: {round(_LEAST_SHRUNK * width)}px">\n'
        f"<figcaption><b>{title}.</b> {html.escape(how_to_read)}</figcaption></figure>"
    )


def shaded_text(units: Sequence[Unit], values: np.ndarray, marked: Unit) -> str:
    """A text whose background shows `values`, red above and blue below 0, and what comes after.

    Args:
      units: pieces of the text.
      values: one number for each.
      marked: the piece that follows them, in a frame.
    """
    largest = float(np.abs(values).max()) or 1.0
    spans = []
    for unit, value in zip(units, values, strict=True):
        color = "214,39,40" if value > 0 else "31,119,180"
        style = f"background:rgba({color},{_STRONGEST * abs(value) / largest:.3f})"
        spans.append(f'<span style="{style}" title="{value:.3g}">{_shown(unit.text)}</span>')
    spans.append(f'<span class="mark">{_shown(marked.text)}</span>')
    return f"<pre>{''.join(spans)}</pre>"


def _shown(text: str) -> str:
    """Spaces as they are; a line end is seen and ends the line."""
    kept = "".join(c if c == " " else visible(c) + ("\n" if c == "\n" else "") for c in text)
    return html.escape(kept)
