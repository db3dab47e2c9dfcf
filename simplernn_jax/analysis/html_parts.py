"""HTML of a self-contained page: embedded plots, no script, readable offline."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from simplernn_jax.analysis.plots import DPI, FITTING
from simplernn_jax.analysis.token_text import Unit, visible

_STYLE = """
:root { color-scheme: light dark; --text: #222; --muted: #555; --page: #fff; --line: #ccc;
  --box: #f4f6f8; --red: 214, 39, 40; --blue: 31, 119, 180; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e4e4; --muted: #aaa; --page: #16181b; --line: #444; --box: #22262b;
    --red: 255, 82, 82; --blue: 66, 165, 245; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  margin: 2rem auto; max-width: 1364px; padding: 0 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; margin-bottom: 0.3rem; }
h2 { font-size: 1.3rem; margin-top: 3rem; border-bottom: 1px solid var(--line); }
p, figcaption, .summary { max-width: 60rem; }
.summary { background: var(--box); border-left: 4px solid rgb(var(--blue)); padding: 0.2rem 1.2rem;
  font-size: 1.1rem; }
.summary h2 { margin-top: 1rem; border: 0; }
figure { margin: 1.5rem 0; }
figure div { overflow-x: auto; }
figure img { display: block; background: #fff; }
figcaption { color: var(--muted); }
.fits img { width: 100%; max-width: 754px; }
.wide img { max-width: 100%; min-width: 900px; }
.hint { display: none; }
@media (max-width: 931px) { .hint { display: block; font-weight: bold; } }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: 0.2rem 0.9rem 0.2rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, .words td { text-align: left; }
pre { font: 14px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: break-word;
  border: 1px solid var(--line); padding: 0.6rem 0.8rem; margin: 0.4rem 0; }
.mark { outline: 2px solid var(--text); font-weight: bold; }
.rest { color: var(--muted); }
.scale { display: flex; flex-wrap: wrap; gap: 0.5rem; align-items: center; color: var(--muted); }
.scale span { width: 10rem; height: 1rem; border: 1px solid var(--line);
  background: linear-gradient(to right, rgba(var(--blue), STRONGEST), transparent,
  rgba(var(--red), STRONGEST)); }
"""


_STRONGEST = 0.7
"""Opacity of full color behind a word, which must stay readable."""


def document(title: str, parts: Iterable[str]) -> str:
    """Return an HTML document of `parts`, each HTML already."""
    body = "\n".join(parts)
    style = _STYLE.replace("STRONGEST", str(_STRONGEST))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def heading(text: str) -> str:
    """Return the title of a section."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    """Return a paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def facts_list(facts: Mapping[str, str]) -> str:
    """Return names and values, one per line."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(fact)}</td></tr>"
        for name, fact in facts.items()
    )
    return f'<table class="words">{rows}</table>'


def table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table with named columns."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def summary(sentences: Iterable[str]) -> str:
    """Return the summary, which can be read alone."""
    body = "".join(paragraph(sentence) for sentence in sentences)
    return f'<section class="summary"><h2>In short</h2>{body}</section>'


def figure(png: bytes, title: str, caption: str, file: str) -> str:
    """Return an embedded plot with its caption.

    A plot too wide for a small screen scrolls there, with a hint that names its `file`.
    """
    data = base64.b64encode(png).decode("ascii")
    width = int.from_bytes(png[16:20], "big")  # from the PNG header
    is_wide = width > FITTING * DPI + 1
    title = html.escape(title)
    hint = f"Wider than this screen: scroll it sideways, or open {html.escape(file)}."
    return (
        f'<figure class="{"wide" if is_wide else "fits"}">'
        + (f'<p class="hint">{hint}</p>' if is_wide else "")
        + f'<div><img src="data:image/png;base64,{data}" alt="{title}"></div>\n'
        f"<figcaption><b>{title}.</b> {html.escape(caption)}</figcaption></figure>"
    )


def color_scale(full: str) -> str:
    """Return a legend for `shaded_text`; `full` is the value of full color."""
    full = html.escape(full)
    return f'<p class="scale">against, {full} <span></span> for, {full}</p>'


def shaded_text(
    units: Sequence[Unit], values: np.ndarray, strongest: float, marked: Unit, rest: str
) -> str:
    """Return a text whose background shows `values`, red above and blue below 0.

    Args:
      units: pieces of the text.
      values: one number for each.
      strongest: the value from which on the color is full.
      marked: the piece that follows, in a frame.
      rest: the text after that, in gray.
    """
    spans = []
    for unit, value in zip(units, values, strict=True):
        color = "--red" if value > 0 else "--blue"
        opacity = _STRONGEST * min(abs(value) / strongest, 1)
        style = f"background:rgba(var({color}),{opacity:.3f})"
        spans.append(f'<span style="{style}" title="{value:.3g}">{_shown(unit.text)}</span>')
    spans.append(f'<span class="mark">{_shown(marked.text)}</span>')
    spans.append(f'<span class="rest">{_shown(rest)}</span>' if rest else "")
    return f"<pre>{''.join(spans)}</pre>"


def _shown(text: str) -> str:
    """Return HTML with spaces unchanged and line ends both visible and effective."""
    kept = "".join(c if c == " " else visible(c) + ("\n" if c == "\n" else "") for c in text)
    return html.escape(kept)
