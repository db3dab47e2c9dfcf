"""Working memory of a train step of `base` on one row, by its length, as a table and a plot."""

import os
from typing import Any

import jax
import numpy as np

from benchmarks import tables
from benchmarks.isolated import call_isolated
from benchmarks.jax_steps import load_config, random_batch
from simplernn_jax.config import Config
from simplernn_jax.sharding.mesh import make_mesh
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.train_step import init_train_state, make_train_step

LENGTHS = (1024, 4096, 16384, 65536)
WINDOW = 1024
DEVICES = 8
WAYS: dict[str, dict[str, Any]] = {
    "whole rows": {},
    f"time over {DEVICES} devices, each": {"sequence": DEVICES},
    "blocks computed again": {"remat": "block"},
    f"exact, windows of {WINDOW:,}": {"backward_window": WINDOW, "backward": "exact"},
    f"truncated, windows of {WINDOW:,}": {"backward_window": WINDOW},
}
"""What differs from plain training; fields of `TrainConfig` or `MeshConfig`."""

_COMPILED_SOON: Any = {"xla_backend_optimization_level": 0}
"""Machine code as it comes; buffers are assigned before."""


def measure() -> list[dict[str, Any]]:
    """1e6 bytes by the compiler's account, ``{"length": T, way: MB, ...}`` for each length."""
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    rows: list[dict[str, Any]] = [{"length": length} for length in LENGTHS]
    for way, fields in WAYS.items():
        arguments: dict[str, Any] = {"fields": fields, "lengths": list(LENGTHS)}
        if "sequence" in fields:
            found = call_isolated(temporary_megabytes, environment, **arguments)
        else:
            found = temporary_megabytes(**arguments)
        for row, megabytes in zip(rows, found, strict=True):
            row[way] = megabytes
    return rows


def temporary_megabytes(fields: dict[str, Any], lengths: list[int]) -> list[float]:
    """Of one device, for a row of each of `lengths`; see `call_isolated`."""
    return [_compile(load_config("base", 1, length), fields) for length in lengths]


def _compile(config: Config, fields: dict[str, Any]) -> float:
    config.mesh.data = 1
    for name, value in fields.items():
        setattr(config.train if hasattr(config.train, name) else config.mesh, name, value)
    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, 1, mesh)
    state = jax.eval_shape(lambda: init_train_state(config, optimizer))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), random_batch(config))
    step: Any = make_train_step(config, optimizer, mesh)
    program = step.lower(state, batch).compile(_COMPILED_SOON)
    return program.memory_analysis().temp_size_in_bytes / 1e6


def show(rows: list[dict[str, Any]]) -> None:
    """Prints what `measure` found."""
    lines = [[f"{row['length']:,}", *(tables.number(row[way]) for way in WAYS)] for row in rows]
    tables.show("scaling: MB a step of base works in, B 1", ["T", *WAYS], lines)


def draw(rows: list[dict[str, Any]], folder: str) -> str:
    """Writes ``memory_against_length.png`` into `folder`; its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    lengths = np.array([row["length"] for row in rows])
    for way, marker, line in zip(WAYS, "osD^v", ("-", "--", "-", "-", ":"), strict=False):
        axes.plot(lengths, [row[way] for row in rows], marker=marker, linestyle=line, label=way)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.yaxis.set_major_formatter(lambda megabytes, _: f"{megabytes:,g}")
    axes.set_xlabel("tokens of the row")
    axes.set_ylabel("working memory of a train step, MB")
    axes.set_title("base, one row: memory against its length")
    axes.grid(alpha=0.3)
    axes.legend()
    path = os.path.join(folder, "memory_against_length.png")
    FigureCanvasAgg(figure).print_png(path)
    return path
