"""The measurements as PNG files, in the look of `simplernn_jax.analysis`."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.attention import distance, recall
from benchmarks.attention.sides import ATTENTION, RECURRENCE, SIDES
from simplernn_jax.analysis.pictures import colors, new_figure, png

_COLORS = {RECURRENCE: "tab:blue", ATTENTION: "tab:orange"}
_MARKERS: dict[str, dict[str, Any]] = {
    RECURRENCE: {"marker": "o"},
    ATTENTION: {"marker": "s", "markersize": 9, "markerfacecolor": "none"},
}
"""Of different shapes, one of them open: neither hides the other where curves meet."""
_STUDENT_MARKERS = "o^Dv*P"
_DOTTED: dict[str, Any] = {"color": "gray", "linestyle": ":", "linewidth": 1}
_PROGRAMS = {
    "attention": ("attention", "tab:orange", "o"),
    "scan": ("recurrence, token by token (scan)", "tab:red", "^"),
    "chunks": ("recurrence in chunks", "tab:green", "s"),
    "ours": ("recurrence as trained here", "tab:blue", "D"),
}


def draw_parallelism(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Time of training, and the longest chain of operations, against T."""
    lengths = [row["length"] for row in rows]
    with new_figure(10, 4) as figure:
        left, right = figure.subplots(1, 2)
        for name, (label, color, marker) in _PROGRAMS.items():
            style = {"color": color, "marker": marker, "markerfacecolor": "none", "label": label}
            left.plot(lengths, [row["us_per_token"][name] for row in rows], **style)
            if name in rows[0]["chain"]:
                right.plot(lengths, [row["chain"][name] for row in rows], **style)
        left.set(
            title=f"training, {rows[0]['layers']} layer(s), {rows[0]['tokens']:,} tokens a step"
        )
        left.set_ylabel("microseconds per token")
        right.set(title="gradient of one row", ylabel="operations that must follow one another")
        _logarithmic(left, lengths)
        _logarithmic(right, lengths)
        left.legend()
        return png(figure)


def draw_memory(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Bytes of a train step and of decoding's state, against T."""
    lengths = [row["length"] for row in rows]
    with new_figure(10, 4) as figure:
        for axes, key, title in zip(
            figure.subplots(1, 2),
            ("training_bytes", "state_bytes"),
            ("train step on one row: working memory", "decoding: state of one row"),
            strict=True,
        ):
            for side in SIDES:
                values = [row[key][side] / 1e6 for row in rows]
                axes.plot(lengths, values, color=_COLORS[side], **_MARKERS[side], label=side)
            axes.set(title=title, ylabel="MB")
            _logarithmic(axes, lengths)
            axes.legend()
        return png(figure)


def draw_cost(cost: Mapping[str, Any]) -> bytes:
    """Operations and times per token against T."""
    with new_figure(10, 7) as figure:
        panels = figure.subplots(2, 2).flat
        for axes, kind in zip(panels, ("training", "reading", "writing"), strict=False):
            by_length = {
                length: {side: sides[side][kind] / 1e6 for side in SIDES}
                for length, sides in cost["flops_per_token"].items()
            }
            _plot_sides(axes, by_length, f"{kind}: operations", "millions per token")
        axes = panels[3]
        for kind, line in (("reading", "-"), ("writing", "--")):
            by_length = cost[f"{kind}_us"]
            _plot_sides(axes, by_length, "time", "microseconds per token", kind, line)
        return png(figure)


def draw_communication(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Bytes that a device receives against T, over the most devices."""
    most = max(row["devices"] for row in rows)
    by_length = {str(row["length"]): row["bytes"] for row in rows if row["devices"] == most}
    in_kb = {n: {side: b / 1e3 for side, b in sides.items()} for n, sides in by_length.items()}
    with new_figure(6, 4) as figure:
        axes = figure.subplots()
        _plot_sides(axes, in_kb, f"one row over {most} devices", "kB received a device and layer")
        return png(figure)


def draw_recall(students: Sequence[Mapping[str, Any]]) -> bytes:
    """Accuracy against pairs, at the length of training and at four times that."""
    titles = {"same": "rows as long as in training", "longer": "rows four times as long"}
    return _draw_students(students, titles, "pairs of key and value")


def draw_distance(tasks: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Accuracy on every other task against length or distance."""
    lessons: dict[str, Any] = {name: lesson for name, (lesson, _) in distance.tasks().items()}
    with new_figure(13, 4) as figure:
        for axes, (name, students) in zip(
            figure.subplots(1, len(tasks)), tasks.items(), strict=True
        ):
            _plot_students(axes, students, "accuracy")
            learned = distance.LENGTH if name != "needle" else max(distance.LEARNED_DISTANCES)
            axes.axvline(learned, **_DOTTED)
            axes.axhline(1 / lessons[name].symbols, **_DOTTED)
            axes.set(title=name, ylabel="share of answers right")
            axes.set_xlabel("distance (tokens)" if name == "needle" else "length of a row (tokens)")
        _legend_beside(figure, axes)
        return png(figure)


def _draw_students(
    students: Sequence[Mapping[str, Any]], curves: Mapping[str, str], along: str
) -> bytes:
    with new_figure(10, 4) as figure:
        for axes, (curve, title) in zip(figure.subplots(1, 2), curves.items(), strict=True):
            _plot_students(axes, students, curve)
            axes.axhline(1 / recall.SYMBOLS, **_DOTTED)
            axes.set(title=title, xlabel=along, ylabel="share of answers right")
        _legend_beside(figure, axes)
        return png(figure)


def _legend_beside(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")


def _plot_students(axes: Any, students: Sequence[Mapping[str, Any]], curve: str) -> None:
    recurrent = [student for student in students if student["name"].startswith(RECURRENCE)]
    shades = dict(zip((s["name"] for s in recurrent), colors(len(recurrent)), strict=True))
    shapes = dict(zip(shades, itertools.cycle(_STUDENT_MARKERS), strict=False))
    numbers: list[int] = []
    for student in students:
        name = student["name"]
        numbers = [int(number) for number in student["accuracy"][curve]]
        color = shades.get(name, "tab:orange" if name == ATTENTION else "tab:red")
        marker, line = (shapes[name], "-") if name in shades else ("s", "--")
        values = list(student["accuracy"][curve].values())
        style = {"color": color, "marker": marker, "markerfacecolor": "none", "label": name}
        axes.plot(numbers, values, line, **style)
    axes.set_ylim(-0.03, 1.03)
    _logarithmic(axes, numbers, both=False)


def _plot_sides(
    axes: Any,
    by_length: Mapping[str, Mapping[str, float]],
    title: str,
    unit: str,
    kind: str = "",
    line: str = "-",
) -> None:
    lengths = sorted(map(int, by_length))
    for side in SIDES:
        values = [by_length[str(length)][side] for length in lengths]
        label = f"{side}, {kind}" if kind else side
        axes.plot(lengths, values, line, color=_COLORS[side], **_MARKERS[side], label=label)
    axes.set(title=title, ylabel=unit)
    _logarithmic(axes, lengths)
    axes.legend()


def _logarithmic(axes: Any, numbers: Sequence[int], both: bool = True) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(numbers), [f"{number:,}" for number in numbers])
    axes.xaxis.minorticks_off()
    axes.grid(axis="y", alpha=0.3)
    if both:
        from matplotlib import ticker

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.set_xlabel("T (tokens)")
