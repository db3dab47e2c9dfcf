"""What a finished run leaves for a person: the loss curve as a picture and a short summary."""

import math
from pathlib import Path
from typing import Any

from simplernn_jax.training.clock import Clock
from simplernn_jax.training.display import clock as clock_time
from simplernn_jax.training.evaluate import Evaluation
from simplernn_jax.training.metrics import read_metrics

FILE_NAME = "loss_curve.png"


def plot_loss(workdir: str) -> str:
    """Draws training and validation loss from ``metrics.jsonl``; returns the picture's path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(workdir)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    train = _series(rows, "train", "loss")
    validation = _series(rows, "validation", "loss")
    if train:
        axes.plot(*zip(*train, strict=True), linewidth=0.8, alpha=0.7, label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), marker="o", markersize=3, label="validation")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title="Loss")
    axes.grid(alpha=0.3)
    if train or validation:
        axes.legend()
    path = str(Path(workdir) / FILE_NAME)
    figure.savefig(path, dpi=120)
    return path


def _series(rows: list[dict[str, Any]], kind: str, name: str) -> list[tuple[int, float]]:
    """Steps and values; a value that was not finite is NaN, a gap in the curve."""
    return [
        (row["step"], math.nan if row[name] is None else row[name])
        for row in rows
        if row["kind"] == kind and name in row
    ]


def facts_of(
    step: int, clock: Clock, skipped: int, recompilations: int, evaluation: Evaluation | None
) -> dict[str, str]:
    """Return what a run that has taken `step` steps says of itself, for `summary`."""
    speed = clock.tokens_per_second
    validation = {} if evaluation is None else {"validation": str(evaluation)}
    return {
        "steps": f"{step:,}",
        "training time": f"{clock_time(clock.seconds)}, of which {clock.first:.1f} s for the "
        "first step (compilation)",
        "speed": f"{speed:,.0f} tokens/s" if speed else "not known from one step",
        "skipped updates": f"{skipped}",
        "recompilations": f"{recompilations}",
        **validation,
    }


def summary(facts: dict[str, str]) -> str:
    """Aligned lines ``name  value``."""
    width = max(map(len, facts))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in facts.items())
