"""Fine-tuning of a trained model on other text, and many tuned states in one server.

`run`: held-out bits per byte after a number of seconds, by what is tuned, beside the model as it is
and the end of the training text as its prompt. The held-out end of the text is scored in contexts
of `CONTEXT` tokens, which begin with the state, learned or of the prompt, or from zero. Time is of
train steps only, and the learning rate decays to its end within it.
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

SECONDS = (15, 60, 240)
KINDS = ("state", "lora:2", "lora:8", "full")
CONTEXT, PROMPT, EVAL_TOKENS = 256, 16384, 65536
PERSONAS = 100
SOURCES = {
    "author": sysconfig.get_path("purelib") + "/*.dist-info/METADATA",
    "language": sysconfig.get_path("include") + "/*.h",
}
"""Texts that are there with every Python: English of many packages, and C."""
_FIRST_STEPS = 12


def run(
    base: str, author: str | None, seconds: Iterable[str], personas: int = PERSONAS
) -> Iterator[Table]:
    """Table by text, and one of the personas; `base` is a workdir, `author` another text."""
    try:
        limits = [number for number in map(float, seconds) if 0 < number < 1e6] or SECONDS
    except ValueError as error:
        raise UserError(f"--seconds={','.join(seconds)}: {error}; list numbers") from error
    sources = SOURCES | ({"author": author} if author else {})
    with tempfile.TemporaryDirectory() as folder:
        state = f"{folder}/{len(sources) - 1}-state-{limits[0]:g}/state.safetensors"
        for number, (name, source) in enumerate(sources.items()):
            rows = compare(base, source, limits, f"{folder}/{number}")
            yield Table(f"tune: held-out bits/byte of another {name}, {source}", rows)
        yield Table("tune: named states in one server", [serve_personas(base, state, personas)])


def compare(base: str, source: str, limits: Sequence[float], folder: str) -> list[Row]:
    """Rows by what is tuned."""
    rows: list[Row] = []
    for kind in KINDS:
        # The first of these steps compile; the rate of the rest gives the number of steps.
        per_step, scores, _ = tune(base, source, kind, _FIRST_STEPS, f"{folder}-{kind}-first")
        if not rows:
            rows = [{"tuned": name, "0 s": score} for name, score in scores.items()]
        row: Row = {"tuned": kind}
        for limit in limits:
            steps = max(1, round(limit / per_step))
            _, scores, row["bytes"] = tune(base, source, kind, steps, f"{folder}-{kind}-{limit:g}")
            row |= {f"{limit:g} s": scores["tuned"], f"{limit:g} s, steps": steps}
        rows.append(row)
    return rows


def tune(
    base: str, source: str, kind: str, steps: int, workdir: str, **fields: Any
) -> tuple[float, dict[str, float], int | None]:
    """Tune `base` for a number of steps.

    Returns the median seconds of a step, held-out bits per byte of the tuned model, or, before
    the first one of `_FIRST_STEPS`, of the model without and with a prompt, and the bytes of the
    file, None for all parameters.
    """
    fields = {"source": source, "split": "position", "steps": steps, "tune": kind} | fields
    if kind == "full":
        fields = {"learning_rate": 1e-3} | fields
    config = load_config("tune", 8, CONTEXT, init_from=base, **fields)
    with Run(config, workdir) as run:
        held_out: Any = run.corpus.validation
        evaluator = Evaluator(run.config, run.corpus.tokenizer.pad_id, run.mesh)

        def bits(initial: Any) -> float:
            contexts = Contexts(CONTEXT, CONTEXT)
            result = evaluator(
                run.state.params, held_out, EVAL_TOKENS, contexts=contexts, initial=initial
            )
            return result.bits_per_byte

        scores = {}
        if steps == _FIRST_STEPS:
            model, _, _ = load_model(base)
            prompt = np.asarray(run.corpus.train.tokens[-PROMPT:], np.int32)
            read = generate(model, [prompt], max_new_tokens=0).state
            scores = {"nothing": bits(None), "text as prompt": bits(read.layers)}
        step: Any = make_train_step(run.config, run.optimizer, run.mesh)
        times = []
        while (batch := run.next_batch()) is not None:
            start = time.perf_counter()
            run.state, _ = jax.block_until_ready(step(run.state, batch))
            times.append(time.perf_counter() - start)
            run.step += 1
        scores["tuned"] = bits(run.state.tuned.get("initial"))
        run.save(wait=True)
    size = None
    if kind != "full":
        size = Path(save_tuned(workdir, run.corpus.tokenizer)).stat().st_size
    return float(np.median(times)), scores, size


def serve_personas(base: str, path: str, count: int) -> Row:
    """Memory of a server, and time to its first token, with variations of a state by name."""
    model, tokenizer, _ = load_model(base)
    state = load_state(path, model, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            layers = jax.tree.map(lambda x, factor=1 - number / 1000: x * factor, state.layers)
            varied = dataclasses.replace(state, layers=layers)
            save_state(f"{folder}/persona-{number}.safetensors", varied, model, tokenizer)
        with serving.serving(base, f"--state_dir={folder}") as (process, url):

            def resident() -> int:
                status = Path(f"/proc/{process.pid}/status").read_text()
                return int(status.split("VmRSS:")[1].split()[0])

            def first_tokens(name: str | None, numbers: Iterator[int]) -> list[float]:
                return [asyncio.run(first_token(url, name and f"{name}-{n}", n)) for n in numbers]

            first_tokens(None, iter(range(10)))  # warm up
            before = resident()
            without = first_tokens(None, iter(range(count)))
            first, again = (first_tokens("persona", iter(range(count))) for _ in range(2))
            after = resident()
    times = {"no state": without, "first use": first, "again": again}
    row: Row = {"states": count, "bytes of each": Path(path).stat().st_size}
    row |= {"memory without, MB": before / 1e3, "more with all, MB": (after - before) / 1e3}
    for name, seconds in times.items():
        row |= serving.percentiles(f"first token, ms, {name}", [1e3 * each for each in seconds])
    return row


async def first_token(url: str, state: str | None, number: int) -> float:
    """Seconds from a request of one token to its first text."""
    fields: Row = {"prompt": f"{number} says: ", "max_tokens": 1, "stream": True}
    fields |= {"ignore_eos": True} | ({"state": state} if state else {})
    async with serving.connected(url) as (reader, writer):
        start = time.perf_counter()
        writer.write(serving.request("POST", "/v1/completions", fields))
        _, first, _ = await serving.read_stream(reader)
    return first - start
