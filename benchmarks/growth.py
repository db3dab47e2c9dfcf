"""Growth of time and memory with parameters, length, batch, corpus and devices.

Each point is a fresh process. A slope is that of a line through the logarithms: 1 is linear. Memory
of a train step is its arguments and working memory on one device, by XLA's memory analysis.
"""

import functools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from simplernn_jax.config import Config, DataConfig
from simplernn_jax.data.token_store import prepare_corpus

from .measure import Effort, call_isolated, on_simulated_devices, process_peak, seconds_of
from .sizes import bytes_by_kind
from .tables import Curves, Row, Table
from .train_steps import change, count_parameters, load_config, lower_step, random_batch, repeated

MILLISECONDS, MEGABYTES, EXCHANGED = QUANTITIES = "time (ms)", "memory (MB)", "exchanged (MB)"
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

Points = dict[str, dict[int, Callable[[], Row]]]
"""Measurements by label and x."""


def run(effort: Effort, largest_corpus: int = 1000) -> Iterator[Table]:
    """Tables of each growth and of all slopes; texts grow to `largest_corpus` MB."""
    slope_rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        growths: list[tuple[str, str, Points]] = [
            *steps(effort.calls),
            ("MB of text", "corpus", tokenizing(Path(folder), largest_corpus)),
            ("devices", "devices", steps_on_devices(effort.calls)),
        ]
        for x, name, points in growths:
            curves = by_quantity(points)
            yield Table(f"growth: {x}", (), panels_of(curves), x, f"growth_{name}")
            slope_rows += slopes(x, curves)
    yield Table("growth: slopes", slope_rows)


def steps(calls: int) -> list[tuple[str, str, Points]]:
    """Train steps: of 1,024 tokens, AdamW; of `base` on one sequence; on sequences of 256."""

    def step_of(config: Config) -> Callable[[], Row]:
        return functools.partial(call_isolated, measure_step, config=config, calls=calls)

    by_size, plain, windows = {}, {}, {}
    for width, layers, heads, vocab in SIZES:
        config = load_config("base", 4, 256, num_layers=layers, num_heads=heads, vocab_size=vocab)
        change(config, hidden_dim=width, key_dim=width, value_dim=width, mlp_dim=3 * width)
        config.optimizer.name = "adamw"
        by_size[count_parameters(config)] = step_of(config)
    for length in LENGTHS:
        fields = {"backward_window": min(1024, length), "backward": "exact"}
        windows[length] = step_of(load_config("base", 1, length, **fields))
        if length <= LONGEST_PLAIN:
            plain[length] = step_of(load_config("base", 1, length))
    by_batch = {n: step_of(load_config("base", n, 256)) for n in BATCHES}
    return [
        ("parameters", "parameters", {PLAIN: by_size}),
        ("tokens of one sequence", "length", {PLAIN: plain, WINDOWS: windows}),
        ("sequences", "batch", {PLAIN: by_batch}),
    ]


def steps_on_devices(calls: int) -> Points:
    """A train step of four sequences a device, on devices that share this machine's cores."""
    points: Points = {"data": {}, "fsdp": {}}
    for axis, by_count in points.items():
        for count in DEVICES:
            config = load_config("base", 4 * count, 256, **{axis: count})
            config.optimizer.name = "adamw"
            given = {"config": config, "calls": calls}
            by_count[count] = functools.partial(on_simulated_devices, count, measure_step, **given)
    return points


def tokenizing(folder: Path, largest: int) -> Points:
    """Tokenizing a text of up to `largest` MB, from reading it to the verified tokens."""
    sizes = [SMALLEST_CORPUS * 10**n for n in range(20) if SMALLEST_CORPUS * 10**n <= largest]
    return {
        label: {
            size: functools.partial(tokenize, folder, size, tokenizer)
            for size in sizes
            if size <= most
        }
        for label, (tokenizer, most) in TOKENIZERS.items()
    }


def tokenize(folder: Path, size: int, tokenizer: str) -> Row:
    """`measure_tokenizing` of a text of `size` MB, in a fresh process."""
    with tempfile.TemporaryDirectory(dir=folder) as inner:
        write_text(Path(inner) / "text", size)
        row: Row = call_isolated(measure_tokenizing, folder=inner, tokenizer=tokenizer)
    return row


def by_quantity(points: Points) -> dict[str, Curves]:
    """Measure all points; return every quantity by label and x."""
    rows = {label: {str(x): call() for x, call in each.items()} for label, each in points.items()}
    found = {key for each in rows.values() for row in each.values() for key in row if row[key]}
    return {
        quantity: {
            label: {x: row[quantity] for x, row in each.items() if row.get(quantity) is not None}
            for label, each in rows.items()
        }
        for quantity in QUANTITIES
        if quantity in found
    }


def measure_step(config: Config, calls: int) -> Row:
    """Median milliseconds and size of a train step, and what its collectives exchange if any."""
    lowered, make_state = lower_step(config)
    program = lowered.compile()
    memory = program.memory_analysis()
    step = repeated(program, make_state(), random_batch(config))
    seconds = [seconds_of(step) for _ in range(calls + 1)][1:]
    row = {
        MILLISECONDS: 1e3 * statistics.median(seconds),
        MEGABYTES: (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e6,
    }
    exchanged = sum(bytes_by_kind(program.as_text(), config).values())
    return row | {EXCHANGED: exchanged / 1e6 or None}


def measure_tokenizing(folder: str, tokenizer: str) -> Row:
    """Milliseconds and peak memory of tokenizing ``text`` in `folder`; for `call_isolated`."""
    config = DataConfig(source=f"{folder}/text", tokenizer=tokenizer)
    started = time.perf_counter()
    peak = process_peak(lambda: bool(prepare_corpus(config, 0, f"{folder}/tokens")))
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


def panels_of(curves: Mapping[str, Curves]) -> dict[str, Curves]:
    """Curves of a picture, titled with their slopes."""
    panels = {}
    for quantity, each in curves.items():
        found = [slope(curve) for curve in each.values() if len(curve) > 1]
        shown = ", ".join(f"{round(value, 2) + 0.0:.2f}" for value in found)
        panels[f"{quantity}, slope {shown}"] = each
    return panels
