"""Growth of time and memory with parameters, length, batch, corpus and devices.

Each point is a fresh process. A slope is that of a line through the logarithms: 1 is linear. Memory
of a train step is its arguments and working memory on one device, by XLA's memory analysis.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from simplernn_jax.config import Config, DataConfig
from simplernn_jax.data.token_store import prepare_corpus
from simplernn_jax.parallel.mesh import make_mesh
from simplernn_jax.training import train_step
from simplernn_jax.training.optimizer import make_optimizer

from . import tables
from .measure import Effort, call_isolated, on_simulated_devices, process_peak, seconds_of
from .sizes import bytes_by_kind
from .tables import Curves, Row, Table
from .train_steps import change, count_parameters, load_config, random_batch

TITLE = "growth: "
PICTURES = {
    "parameters": "parameters",
    "tokens of one sequence": "length",
    "sequences": "batch",
    "MB of text": "corpus",
    "devices": "devices",
}
"""Name of the picture by quantity on its x axis."""
TITLES = {f"{TITLE}{x}": name for x, name in PICTURES.items()}
MILLISECONDS, MEGABYTES, EXCHANGED = "time (ms)", "memory (MB)", "exchanged (MB)"
PLAIN, WINDOWS = "whole sequence", "exact, windows of 1,024"
SIZES = (
    (128, 4, 4, 259),
    (256, 4, 4, 259),
    (384, 6, 6, 259),
    (512, 6, 8, 8192),
    (768, 12, 12, 50304),
)
"""Width, layers, heads and vocabulary of models; the last is near `gpt2_size`."""
LENGTHS = tuple(4**n for n in range(4, 11))
LONGEST_PLAIN = 4**8
BATCHES = tuple(4**n for n in range(5))
DEVICES = (1, 2, 4, 8)
SMALLEST_CORPUS = 10
"""MB."""
TOKENIZERS = {"bytes": ("byte", math.inf), "BPE of 8,192": ("bpe:8192", 1000)}
"""Tokenizer and MB of the largest text by label; a BPE, which is trained first, takes longer."""
_FILE_BYTES = 1_000_000
_VOCABULARY = 20_000
"""Words that texts are drawn from."""


def run(effort: Effort, largest_corpus: int = 1000) -> Iterator[Table]:
    """Tables of each growth and of all slopes; texts grow to `largest_corpus` MB."""
    slope_rows: list[Row] = []
    corpora = [
        SMALLEST_CORPUS * 10**n for n in range(20) if SMALLEST_CORPUS * 10**n <= largest_corpus
    ]
    growths: Mapping[str, Callable[[], dict[str, Curves]]] = {
        "parameters": lambda: grow_parameters(effort.calls),
        "tokens of one sequence": lambda: grow_length(effort.calls),
        "sequences": lambda: grow_batch(effort.calls),
        "MB of text": lambda: grow_corpus(corpora),
        "devices": lambda: grow_devices(effort.calls),
    }
    for x, measure in growths.items():
        curves = measure()
        yield f"{TITLE}{x}", rows_of(x, curves)
        slope_rows += slopes(x, curves)
    yield f"{TITLE}slopes", slope_rows


def grow_parameters(calls: int) -> dict[str, Curves]:
    """A train step of 1,024 tokens, AdamW."""
    points: dict[str, Row] = {}
    for width, layers, heads, vocab in SIZES:
        config = load_config("base", 4, 256, num_layers=layers, num_heads=heads, vocab_size=vocab)
        change(config, hidden_dim=width, key_dim=width, value_dim=width, mlp_dim=3 * width)
        config.optimizer.name = "adamw"
        points[str(count_parameters(config))] = isolated_step(config, calls)
    return by_quantity({PLAIN: points})


def grow_length(calls: int) -> dict[str, Curves]:
    """A train step of `base` on one sequence."""
    measured: dict[str, dict[str, Row]] = {PLAIN: {}, WINDOWS: {}}
    for length in LENGTHS:
        windows = {"bptt_window": min(1024, length), "bptt": "full"}
        cases = {PLAIN: {}, WINDOWS: windows} if length <= LONGEST_PLAIN else {WINDOWS: windows}
        for label, fields in cases.items():
            config = load_config("base", 1, length, **fields)
            measured[label][str(length)] = isolated_step(config, calls)
    return by_quantity(measured)


def grow_batch(calls: int) -> dict[str, Curves]:
    """A train step of `base` on sequences of 256 tokens."""
    points = {str(n): isolated_step(load_config("base", n, 256), calls) for n in BATCHES}
    return by_quantity({PLAIN: points})


def grow_devices(calls: int) -> dict[str, Curves]:
    """A train step of four sequences a device, on devices that share this machine's cores."""
    measured: dict[str, dict[str, Row]] = {}
    for axis in ("data", "fsdp"):
        for count in DEVICES:
            config = load_config("base", 4 * count, 256)
            config.optimizer.name = "adamw"
            change(config, **{axis: count})
            row = on_simulated_devices(count, measure_step, config=config, calls=calls)
            measured.setdefault(axis, {})[str(count)] = row
    return by_quantity(measured, EXCHANGED)


def grow_corpus(sizes: Sequence[int]) -> dict[str, Curves]:
    """Tokenizing a text, from reading it to the verified tokens."""
    measured: dict[str, dict[str, Row]] = {label: {} for label in TOKENIZERS}
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            write_text(Path(folder) / "text", size)
            for label, (tokenizer, largest) in TOKENIZERS.items():
                if size <= largest:
                    measured[label][str(size)] = call_isolated(
                        measure_tokenizing, folder=folder, tokenizer=tokenizer
                    )
    return by_quantity(measured)


def by_quantity(measured: Mapping[str, Mapping[str, Row]], *more: str) -> dict[str, Curves]:
    """Every quantity, by label and x."""
    return {
        quantity: {
            label: {x: row[quantity] for x, row in points.items() if row[quantity] is not None}
            for label, points in measured.items()
        }
        for quantity in (MILLISECONDS, MEGABYTES, *more)
    }


def isolated_step(config: Config, calls: int) -> Row:
    """`measure_step` in a fresh process."""
    row: Row = call_isolated(measure_step, config=config, calls=calls)
    return row


def measure_step(config: Config, calls: int) -> Row:
    """Median milliseconds and size of a train step, and what its collectives exchange."""
    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, 1000, mesh)
    jitted: Any = train_step.make_train_step(config, optimizer, mesh)
    batch = random_batch(config)
    init: Any = train_step.init_train_state
    shardings = train_step.state_shardings(config, optimizer, mesh)
    state = jax.jit(lambda: init(config, optimizer), out_shardings=shardings)()
    program = jitted.lower(state, batch).compile()
    memory = program.memory_analysis()

    def step() -> Any:
        nonlocal state
        state, metrics = program(state, batch)
        return metrics

    seconds = [seconds_of(step) for _ in range(calls + 1)][1:]
    return {
        MILLISECONDS: 1e3 * statistics.median(seconds),
        MEGABYTES: (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e6,
        EXCHANGED: sum(bytes_by_kind(program.as_text(), config).values()) / 1e6 or None,
    }


def measure_tokenizing(folder: str, tokenizer: str) -> Row:
    """Milliseconds and peak memory of tokenizing ``text`` in `folder`; for `call_isolated`."""
    config = DataConfig(source=f"{folder}/text", tokenizer=tokenizer)
    tokens = f"{folder}/tokens-{tokenizer}"
    started = time.perf_counter()
    peak = process_peak(lambda: bool(prepare_corpus(config, 0, tokens)))
    milliseconds = 1e3 * (time.perf_counter() - started)
    return {MILLISECONDS: milliseconds, MEGABYTES: peak and peak / 1e6}


def write_text(folder: Path, megabytes: int) -> None:
    """Write files of random words, 1 MB each."""
    draw = np.random.default_rng(0)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
    words = [draw.choice(letters, draw.integers(2, 10)).tobytes() for _ in range(_VOCABULARY)]
    folder.mkdir()
    for number in range(megabytes):
        text = b" ".join(words[i] for i in draw.integers(0, _VOCABULARY, _FILE_BYTES // 6))
        (folder / f"{number}.txt").write_bytes(text[:_FILE_BYTES].ljust(_FILE_BYTES))


def slopes(x: str, curves: Mapping[str, Curves]) -> list[Row]:
    """Slope of every curve: fitted, and between its last two points."""
    return [
        {"growth with": x, "quantity": quantity, "curve": label}
        | {"slope": slope(curve), "at the end": slope(dict(list(curve.items())[-2:]))}
        for quantity, each in curves.items()
        for label, curve in each.items()
        if len(curve) > 1
    ]


def slope(curve: Mapping[str, float]) -> float:
    """Slope of the line through the points' logarithms, by least squares."""
    xs, ys = ([math.log(float(n)) for n in numbers] for numbers in (curve, curve.values()))
    return float(np.polyfit(xs, ys, 1)[0])


def rows_of(x: str, curves: Mapping[str, Curves]) -> list[Row]:
    """Rows of a table: all curves at every x."""
    flat = {
        (quantity if len(each) == 1 else f"{quantity}, {label}"): curve
        for quantity, each in curves.items()
        for label, curve in each.items()
    }
    return tables.by_x(x, flat)


def draw(title: str, rows: Sequence[Row]) -> bytes:
    """A PNG file of one growth, with its slopes."""
    x = title.removeprefix(TITLE)
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for heading in list(rows[0])[1:]:
        quantity, _, label = heading.partition(", ")
        curve = {str(row[x]): row[heading] for row in rows if row.get(heading) is not None}
        if curve:
            panels.setdefault(quantity, {})[label or "measured"] = curve
    titled = {}
    for quantity, each in panels.items():
        found = ", ".join(
            f"{round(slope(curve), 2) + 0.0:.2f}" for curve in each.values() if len(curve) > 1
        )
        titled[f"{quantity}, slope {found}"] = each
    return tables.draw(titled, x)
