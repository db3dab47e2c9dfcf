"""Growth of time and memory with parameters, length, batch, corpus and devices.

Each point is a fresh process. A slope is that of a line through the logarithms: 1 is linear. Memory
of a train step is its arguments and working memory on one device, by XLA's memory analysis.
"""

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
from .tables import Row, Table
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

Points = Mapping[str, Mapping[str, Row]]
"""Every quantity by label and x."""


def run(effort: Effort, largest_corpus: int = 1000) -> Iterator[Table]:
    """Tables of each growth and of all slopes; texts grow to `largest_corpus` MB."""
    calls = effort.calls
    growths: tuple[tuple[str, str, Callable[[], Points]], ...] = (
        ("parameters", "parameters", lambda: grow_parameters(calls)),
        ("tokens of one sequence", "length", lambda: grow_length(calls)),
        ("sequences", "batch", lambda: grow_batch(calls)),
        ("MB of text", "corpus", lambda: grow_corpus(largest_corpus)),
        ("devices", "devices", lambda: grow_devices(calls)),
    )
    rows: list[Row] = []
    for x, name, measure in growths:
        points, panels = measure(), {}
        for quantity in QUANTITIES:
            curves = {
                label: {n: row[quantity] for n, row in each.items() if row.get(quantity)}
                for label, each in points.items()
            }
            slopes = {label: slope(curve) for label, curve in curves.items() if len(curve) > 1}
            for label, found in slopes.items():
                last = slope(dict(list(curves[label].items())[-2:]))
                row = {"growth with": x, "quantity": quantity, "curve": label, "slope": found}
                rows.append(row | {"at the end": last})
            if any(curves.values()):
                shown = ", ".join(f"{round(value, 2) + 0.0:.2f}" for value in slopes.values())
                panels[f"{quantity}, slope {shown or '-'}"] = curves
        yield Table(f"growth: {x}", (), panels, x, f"growth_{name}")
    yield Table("growth: slopes", rows)


def grow_parameters(calls: int) -> Points:
    """A train step of 1,024 tokens, AdamW."""
    points: dict[str, Row] = {}
    for width, layers, heads, vocab in SIZES:
        config = load_config("base", 4, 256, num_layers=layers, num_heads=heads, vocab_size=vocab)
        change(config, hidden_dim=width, key_dim=width, value_dim=width, mlp_dim=3 * width)
        config.optimizer.name = "adamw"
        row = call_isolated(measure_step, config=config, calls=calls)
        points[str(count_parameters(config))] = row
    return {PLAIN: points}


def grow_length(calls: int) -> Points:
    """A train step of `base` on one sequence."""
    points: dict[str, dict[str, Row]] = {PLAIN: {}, WINDOWS: {}}
    for length in LENGTHS:
        windows = {"bptt_window": min(1024, length), "bptt": "full"}
        for label, fields in ((PLAIN, {}), (WINDOWS, windows)):
            if label == WINDOWS or length <= LONGEST_PLAIN:
                config = load_config("base", 1, length, **fields)
                row = call_isolated(measure_step, config=config, calls=calls)
                points[label][str(length)] = row
    return points


def grow_batch(calls: int) -> Points:
    """A train step of `base` on sequences of 256 tokens."""
    configs = {str(n): load_config("base", n, 256) for n in BATCHES}
    return {
        PLAIN: {
            n: call_isolated(measure_step, config=config, calls=calls)
            for n, config in configs.items()
        }
    }


def grow_devices(calls: int) -> Points:
    """A train step of four sequences a device, on devices that share this machine's cores."""
    points: dict[str, dict[str, Row]] = {"data": {}, "fsdp": {}}
    for axis, by_count in points.items():
        for count in DEVICES:
            config = load_config("base", 4 * count, 256, **{axis: count})
            config.optimizer.name = "adamw"
            row = on_simulated_devices(count, measure_step, config=config, calls=calls)
            by_count[str(count)] = row
    return points


def grow_corpus(largest: int) -> Points:
    """Tokenizing a text of up to `largest` MB, from reading it to the verified tokens."""
    points: dict[str, dict[str, Row]] = {label: {} for label in TOKENIZERS}
    size = SMALLEST_CORPUS
    while size <= largest:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            write_text(Path(folder) / "text", size)
            for label, (tokenizer, most) in TOKENIZERS.items():
                if size <= most:
                    row = call_isolated(measure_tokenizing, folder=folder, tokenizer=tokenizer)
                    points[label][str(size)] = row
        size *= 10
    return points


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
    peak = process_peak(lambda: bool(prepare_corpus(config, 0, f"{folder}/{tokenizer}")))
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


def slope(curve: Mapping[str, float]) -> float:
    """Slope of the line through the points' logarithms, by least squares."""
    xs, ys = ([math.log(float(n)) for n in numbers] for numbers in (curve, curve.values()))
    return float(np.polyfit(xs, ys, 1)[0])
