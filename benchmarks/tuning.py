"""Fine-tuning of a trained model on other text, and many learned states in one server.

Held-out bits per byte after a number of seconds of train steps, by what is tuned, beside the model
as it is and with the end of the training text as its prompt. The held-out end of the text is scored
in contexts of `CONTEXT` tokens, which begin with the state, if there is one, or from zero.
"""

import asyncio
import dataclasses
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from simplernn_jax import load_model
from simplernn_jax.data.evaluation_batches import Contexts
from simplernn_jax.errors import UserError
from simplernn_jax.inference import generate, load_state, save_state
from simplernn_jax.training.evaluate import Evaluator
from simplernn_jax.training.run import Run
from simplernn_jax.training.train_step import make_train_step
from simplernn_jax.training.tuning import save_tuned

from . import serving
from .tables import Row, Table
from .train_steps import load_config

SECONDS = (15.0, 60.0, 240.0)
KINDS = ("state", "lora:2", "lora:8", "full")
CONTEXT, PROMPT, EVAL_TOKENS = 256, 16384, 65536
TIMED_STEPS, PERSONAS = 12, 100
SOURCES = {
    "author": sysconfig.get_path("purelib") + "/*.dist-info/METADATA",
    "language": sysconfig.get_path("include") + "/*.h",
}
"""Texts that every Python has: descriptions of packages, and C."""


def run(base: str, author: str | None, seconds: Iterable[str]) -> Iterator[Table]:
    """Table by text, and one of the personas; `base` is a workdir, `author` another text."""
    try:
        limits = [limit for limit in map(float, seconds) if 0 < limit < 1e6] or SECONDS
    except ValueError as error:
        raise UserError(f"--seconds={','.join(seconds)}: {error}; list numbers") from error
    sources = SOURCES | ({"author": author} if author else {})
    with tempfile.TemporaryDirectory() as folder:
        for name, source in sources.items():
            rows = compare(base, source, limits, f"{folder}/{name}")
            yield Table(f"tune: held-out bits/byte of another {name}, {source}", rows)
        state = f"{folder}/language-state-{limits[0]}/state.safetensors"
        yield Table("tune: learned states in one server", [serve_personas(base, state)])


def compare(base: str, source: str, limits: Sequence[float], folder: str) -> list[Row]:
    """Rows by what is tuned."""
    rows: list[Row] = []
    for kind in KINDS:
        timed = tune(base, source, kind, TIMED_STEPS, f"{folder}-{kind}-timed")
        if not rows:
            names = ("nothing", "text as prompt")
            rows = [{"tuned": name, "bits/byte": timed[name]} for name in names]
        row: Row = {"tuned": kind}
        for limit in limits:
            steps = max(1, round(limit / timed["seconds"]))
            tuned = tune(base, source, kind, steps, f"{folder}-{kind}-{limit}")
            row |= {"bytes": tuned["bytes"], f"{limit:g} s": tuned["bits/byte"]}
            row[f"steps in {limit:g} s"] = steps
        rows.append(row)
    return rows


def tune(base: str, source: str, kind: str, steps: int, workdir: str, **fields: Any) -> Row:
    """Tune `base` for a number of steps.

    Returns the median ``seconds`` of a step, held-out bits per byte before and after, and the
    ``bytes`` of the file of the result, None for all parameters.
    """
    rate = {"learning_rate": 1e-2} if kind == "full" else {}
    fields = {"source": source, "split": "position", "steps": steps, "tune": kind} | rate | fields
    config = load_config("tune", 8, CONTEXT, init_from=base, **fields)
    with Run(config, workdir) as run:
        held_out: Any = run.corpus.validation
        evaluator = Evaluator(run.config, run.corpus.tokenizer.pad_id, run.mesh)

        def bits(initial: Any) -> float:
            options = {"contexts": Contexts(CONTEXT, CONTEXT), "initial": initial}
            return evaluator(run.state.params, held_out, EVAL_TOKENS, **options).bits_per_byte

        prompt = np.asarray(run.corpus.train.tokens[-PROMPT:], np.int32)
        read = generate(load_model(base)[0], [prompt], max_new_tokens=0).state
        row: Row = {"nothing": bits(None), "text as prompt": bits(read.layers)}
        step: Any = make_train_step(run.config, run.optimizer, run.mesh)
        times = []
        while (batch := run.next_batch()) is not None:
            start = time.perf_counter()
            run.state, _ = jax.block_until_ready(step(run.state, batch))
            times.append(time.perf_counter() - start)
            run.step += 1
        row |= {"seconds": float(np.median(times)), "bytes": None}
        row["bits/byte"] = bits(run.state.tuned.get("initial"))
        run.save(wait=True)
    if kind != "full":
        row["bytes"] = Path(save_tuned(workdir, run.corpus.tokenizer)).stat().st_size
    return row


def serve_personas(base: str, path: str) -> Row:
    """Memory of a server, and time to its first token, with variations of a state by name."""
    model, tokenizer, _ = load_model(base)
    state = load_state(path, model, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(PERSONAS):
            layers = jax.tree.map(lambda x, factor=1 - number / 1000: x * factor, state.layers)
            varied = dataclasses.replace(state, layers=layers)
            save_state(f"{folder}/p{number}.safetensors", varied, model, tokenizer)
        with serving.serving(base, f"--state_dir={folder}") as (process, url):

            def megabytes() -> float:
                status = Path(f"/proc/{process.pid}/status").read_text()
                return int(status.split("VmRSS:")[1].split()[0]) / 1e3

            names = [f"p{number}" for number in range(PERSONAS)]
            asyncio.run(first_tokens(url, [None] * 10))  # warm up
            row: Row = {"states": PERSONAS, "memory before, MB": megabytes()}
            for kind, states in (
                ("no state", [None] * PERSONAS),
                ("first", names),
                ("next", names),
            ):
                milliseconds = [1e3 * s for s in asyncio.run(first_tokens(url, states))]
                row |= serving.percentiles(f"first token, ms, {kind} request", milliseconds)
            return row | {"memory after, MB": megabytes()}


async def first_tokens(url: str, states: Sequence[str | None]) -> list[float]:
    """Seconds from requests of one token, one after the other, to their first text."""
    seconds = []
    async with serving.connected(url) as (reader, writer):
        for number, state in enumerate(states):
            fields: Row = {"prompt": f"{number}:", "max_tokens": 1, "stream": True, "state": state}
            start = time.perf_counter()
            writer.write(serving.request("POST", "/v1/completions", fields | {"ignore_eos": True}))
            seconds.append((await serving.read_stream(reader))[1] - start)
    return seconds
