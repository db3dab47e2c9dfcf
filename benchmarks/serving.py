"""The server under load: throughput and latency over HTTP, beside generation in process.

Each client streams completions of prompts of its own, one after the other. `generate` decodes as
many sequences together, up to the number of slots.
"""

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from simplernn_jax import load_model, project
from simplernn_jax.checkpoint.checkpointer import Checkpointer
from simplernn_jax.config import Config
from simplernn_jax.data.token_store import TokenizedCorpus
from simplernn_jax.inference import generate
from simplernn_jax.models import LanguageModel
from simplernn_jax.training.preparation import prepare

from . import measure, tables
from .decoding import random_tokens
from .http_client import Connection, body_of, connected, status_of
from .measure import Effort, call_isolated, resident_bytes
from .tables import Row, Table
from .train_steps import change, load_config

TITLE = "serve: base"
COMPLETE = "/v1/completions"
CLIENTS, SLOTS = (1, 8, 32, 64), 32
PROMPT, NEW_TOKENS, LONG = 100, 256, 1024
"""Tokens of a prompt, of a completion, and of a long one."""
COMPLETIONS = 10
"""Completions of each client, one after the other."""


class Stream(NamedTuple):
    """Seconds from the request to the first text and to the end, and the number of tokens."""

    first: float
    end: float
    tokens: int


def run(effort: Effort) -> Iterator[Table]:
    """Tables of load, and of what a server must withstand."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "text.txt")
        source.write_text("A text. " * 1000, encoding="utf-8")
        save_untrained(
            change(load_config("base", 1, 256), source=str(source), sample_every=0), folder
        )
        model, _, _ = load_model(folder)
        with serving(folder, f"--slots={SLOTS}", "--max_queue=64") as (process, url):
            yield TITLE, [compare(model, url, clients, effort) for clients in CLIENTS]
            long = compare(model, url, SLOTS, effort, tokens=LONG)
            yield f"serve: completions of {LONG:,} tokens", [long]
            apart = compare(model, url, SLOTS, effort, is_staggered=True)
            yield "serve: clients that begin apart", [apart]
            half = asyncio.run(half_loaded(model, url, effort))
            yield "serve: one more prompt beside 16 streams", [half]
            yield "serve: limits", asyncio.run(limits(model, url, process.pid))


def compare(
    model: LanguageModel,
    url: str,
    clients: int,
    effort: Effort,
    tokens: int = NEW_TOKENS,
    is_staggered: bool = False,
) -> Row:
    """Rates and latencies of a number of clients at once, and the rate of `generate`."""
    prompts = random_tokens(model.config, clients, COMPLETIONS * PROMPT)
    rates: dict[str, list[float]] = {"HTTP": [], "generate": []}
    streams: list[Stream] = []
    for block in range(effort.blocks * effort.calls + 1):
        # Other prompts each time, or the prefix cache would have them.
        prompts = (prompts + 1) % model.config.vocab_size
        seconds, found = asyncio.run(stream_all(url, prompts, tokens, is_staggered))
        start = time.perf_counter()
        new = generate(model, prompts[:SLOTS, :PROMPT], max_new_tokens=tokens).tokens
        in_process = time.perf_counter() - start
        if block:  # the first one warms up
            streams += found
            rates["HTTP"].append(sum(stream.tokens for stream in found) / seconds)
            rates["generate"].append(new.size / in_process)
    between = [1e3 * (s.end - s.first) / s.tokens for s in streams]
    return (
        {"clients": clients}
        | {f"{name} tokens/s": float(np.median(rate)) for name, rate in rates.items()}
        | {"ratio": float(np.median(np.divide(rates["HTTP"], rates["generate"])))}
        | percentiles("first token, ms", [1e3 * stream.first for stream in streams])
        | percentiles("per token, ms", between)
    )


def draw(rows: list[Row]) -> bytes:
    """A PNG file of the table of loads."""

    def curve(column: str) -> dict[str, float]:
        return {str(row["clients"]): row[column] for row in rows}

    rates = {name: curve(f"{name} tokens/s") for name in ("HTTP", "generate")}
    panels = {"tokens/s": rates}
    for column in ("first token, ms, p50", "per token, ms, p50"):
        panels[column] = {"HTTP": curve(column)}
    return tables.draw(panels, "clients")


async def half_loaded(model: LanguageModel, url: str, effort: Effort) -> Row:
    """Time to the first token of one more prompt, while half of the slots stream."""
    prompts = random_tokens(model.config, SLOTS // 2, PROMPT)
    others = asyncio.ensure_future(stream_all(url, prompts, 20 * NEW_TOKENS))
    await asyncio.sleep(0.5)
    firsts: list[float] = []
    while len(firsts) < 4 * effort.blocks * effort.calls and not others.done():
        prompt = (prompts[:1] + len(firsts) + 1) % model.config.vocab_size
        _, (stream,) = await stream_all(url, prompt, 8)
        firsts.append(1e3 * stream.first)
    await others
    return percentiles("first token, ms", firsts)


async def limits(model: LanguageModel, url: str, pid: int) -> list[Row]:
    """A long prefix read twice, clients that leave, and more connections than the queue holds."""
    prefix = random_tokens(model.config, 1, 50_000)
    times = [(await stream_all(url, prefix, 1))[0] for _ in range(2)]
    rows: list[Row] = [{"measured": "50,000 tokens again / at first", "value": times[1] / times[0]}]

    prompts = random_tokens(model.config, 200, PROMPT)
    asked = [fields_of(prompt, 10**6) for prompt in prompts]
    leaving = [asyncio.ensure_future(status_of(url, COMPLETE, one)) for one in asked]
    await asyncio.sleep(0.5)
    for task in leaving:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    start = time.perf_counter()
    await stream_all(url, prompts[:1], 1)
    while json.loads(await body_of(url, "/slots"))["active"]:
        await asyncio.sleep(0.01)
    idle = time.perf_counter() - start
    rows.append({"measured": "all idle after 200 clients left, s", "value": idle})

    before, health = resident_bytes(pid), []
    burst = asyncio.ensure_future(asyncio.to_thread(call_isolated, statuses, url=url))
    while not burst.done():
        start = time.perf_counter()
        await body_of(url, "/health")
        health.append(1e3 * (time.perf_counter() - start))
        await asyncio.sleep(0.02)
    rows += [
        {"measured": f"status {status} of 1,000 connections", "value": count}
        for status, count in sorted(burst.result().items())
    ]
    slowest, added = float(np.percentile(health, 99)), (resident_bytes(pid) - before) / 1e6
    rows.append({"measured": "/health meanwhile, ms, p99", "value": slowest})
    rows.append({"measured": "memory added, MB", "value": added})
    return rows


def statuses(url: str) -> Counter[int]:
    """Numbers of the statuses of 1,000 completions that are asked for at once."""

    async def ask() -> Counter[int]:
        prompts = np.random.default_rng(0).integers(0, 256, (1000, PROMPT))
        asked = [fields_of(prompt, 32) for prompt in prompts]
        return Counter(await asyncio.gather(*(status_of(url, COMPLETE, one) for one in asked)))

    return asyncio.run(ask())


def percentiles(name: str, values: Sequence[float]) -> dict[str, float]:
    """Columns of the median and the 99th percentile."""
    return {f"{name}, p{p}": float(np.percentile(values, p)) for p in (50, 99)}


async def stream_all(
    url: str, prompts: np.ndarray, tokens: int, is_staggered: bool = False
) -> tuple[float, list[Stream]]:
    """Stream completions of each row of prompts, over a connection of its own.

    A row has as many prompts of `PROMPT` tokens as fit, or one longer. If staggered, the first
    completion of each client ends at another time, and the last one makes up for it. Returns the
    seconds of all, and each of them.
    """

    async def client(index: int, row: np.ndarray) -> list[Stream]:
        count = len(row) // PROMPT if len(row) <= COMPLETIONS * PROMPT else 1
        lengths = np.full(count, tokens)
        if is_staggered:
            lengths[0] = tokens * (index + 1) // len(prompts)
            lengths[-1] += tokens - lengths[0]
        parts = zip(np.split(row, count), lengths.tolist(), strict=True)
        async with connected(url) as connection:
            return [await stream_one(connection, prompt, length) for prompt, length in parts]

    start = time.perf_counter()
    streams = await asyncio.gather(*(client(index, row) for index, row in enumerate(prompts)))
    return time.perf_counter() - start, [stream for some in streams for stream in some]


async def stream_one(connection: Connection, prompt: np.ndarray, tokens: int) -> Stream:
    """Stream a completion."""
    start = time.perf_counter()
    parts, times = await connection.stream(COMPLETE, fields_of(prompt, tokens))
    answer = b"".join(parts)
    is_text = (b"data: {" in part for part in parts)
    first = next(time for time, found in zip(times, is_text, strict=True) if found) - start
    tokens = int(re.findall(rb'"completion_tokens":(\d+)', answer)[-1])
    return Stream(first, times[-1] - start, tokens)


def fields_of(prompt: np.ndarray, tokens: int) -> Any:
    """Body of a request that streams greedy tokens, whatever they are."""
    return {
        "prompt": prompt.tolist(),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def save_untrained(
    config: Config, workdir: str | Path, step: int = 1, model_seed: int | None = None
) -> TokenizedCorpus:
    """Save a checkpoint of an untrained model in `workdir`; return its corpus."""
    config, corpus = prepare(config, str(workdir))
    seed = config.train.seed if model_seed is None else model_seed
    params = nnx.state(LanguageModel(config.model, rngs=nnx.Rngs(seed)), nnx.Param)
    tokenizer_json = corpus.tokenizer.to_json()
    checkpointer = Checkpointer(str(workdir), config, tokenizer_json, keep_last=2, keep_best=0)
    checkpointer.save(step, {"params": params}, {"content_hash": corpus.content_hash})
    checkpointer.close()
    return corpus


@contextlib.contextmanager
def serving(workdir: object, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start ``scripts/serve.py`` on a free port; yield its process and URL once it is ready."""
    # An editable install leaves the name of its path hook in sys.path, which is not a folder.
    path = os.pathsep.join([str(measure.PACKAGES), *filter(os.path.isabs, sys.path)])
    process = subprocess.Popen(
        [
            *(sys.executable, project.ROOT / "scripts" / "serve.py"),
            *(f"--workdir={workdir}", "--port=0", *flags),
        ],
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
    )
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stderr:
            lines.append(line.decode())
            if found := re.search(r"listening on (http\S+)", lines[-1]):
                yield process, found[1]
                return
        raise RuntimeError("".join(lines))
    finally:
        process.terminate()
        try:
            process.communicate(timeout=60)
        finally:
            process.kill()
