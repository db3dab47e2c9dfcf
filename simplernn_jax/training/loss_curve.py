"""Plot of the loss curve of a run."""

import io
import math
import os
from collections.abc import Iterable, Sequence

from simplernn_jax.errors import one_line
from simplernn_jax.files import write_file
from simplernn_jax.training.metrics import Row, read_metrics

FILE_NAME = "loss_curve.png"

MAX_TITLE_LENGTH = 75

BEGINNING, HEADROOM = 0.1, 0.35
"""Fraction of initial steps whose losses may be clipped by the y-axis; space above the others, as a
fraction of their range."""

Series = tuple[list[int], list[float]]
"""Steps and losses; a loss that was not finite is NaN, a gap in the curve."""


def plot_loss(workdir: str, model: str) -> str:
    """Plot training and validation loss from ``metrics.jsonl``; `model` is named in the title.

    The loss axis is scaled to the losses after the first steps, and the best validation loss is
    marked with its value.

    Returns:
      The plot's path.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    train, validation = loss_curves(read_metrics(workdir))
    # Large type stays readable in a thumbnail.
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if train[0]:
        axes.plot(*train, linewidth=1.2, color="#9ab8d8", label="training")
    if validation[0]:
        axes.plot(*validation, marker="o", markersize=5, color="#c44e17", label="validation")
    points = [(loss, -step) for step, loss in zip(*validation, strict=True) if loss == loss]
    if points:
        loss, step = min(points)[0], -min(points)[1]
        # The value is in the legend: next to the point it would cover a curve.
        label = f"best {loss:.3f} at step {step:,}"
        axes.plot(step, loss, "ko", markersize=12, markerfacecolor="none", label=label)
    axes.set_ylim(top=highest_loss(train, validation))
    title = f"{os.path.basename(os.path.abspath(workdir))}: {model}"
    axes.set_title(one_line(title, MAX_TITLE_LENGTH), fontsize=15, parse_math=False)
    axes.set_xlabel("optimizer step", fontsize=15)
    axes.set_ylabel("loss (nats per token)", fontsize=15)
    axes.tick_params(labelsize=14)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(alpha=0.3)
    if train[0] or validation[0]:
        figure.legend(fontsize=14, loc="outside lower center", ncols=3, frameon=False)
    path = os.path.join(workdir, FILE_NAME)
    content = io.BytesIO()
    figure.savefig(content, dpi=120)
    write_file(path, content.getvalue())
    return path


def loss_curves(rows: Iterable[Row]) -> tuple[Series, Series]:
    """Return training losses and losses of `comparable` evaluations, from ``metrics.jsonl``."""
    rows = [row for row in rows if "loss" in row]
    train = [row for row in rows if row["kind"] == "train"]
    return _series(train), _series(comparable(rows))


def comparable(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of validation that scored the same tokens as the last one.

    They differ only where a resumed run has another ``eval_tokens``.
    """
    evaluations = [row for row in rows if row["kind"] == "validation"]
    last = evaluations[-1].get("predictions") if evaluations else None
    return [row for row in evaluations if row.get("predictions") == last]


def highest_loss(*curves: Series) -> float | None:
    """Return the top of a loss axis that shows all losses except high ones at the start."""
    points = [point for curve in curves for point in zip(*curve, strict=True)]
    newest = max((step for step, _ in points), default=0)
    losses = [loss for step, loss in points if math.isfinite(loss) and step >= BEGINNING * newest]
    return max(losses) + HEADROOM * (max(losses) - min(losses)) + 0.01 if losses else None


def _series(rows: Sequence[Row]) -> Series:
    losses = [math.nan if row["loss"] is None else row["loss"] for row in rows]
    return [row["step"] for row in rows], losses
