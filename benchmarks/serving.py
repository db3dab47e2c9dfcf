"""The server under load: throughput and latency over HTTP, beside generation in process.

Each client streams one completion of a prompt of its own. `generate` decodes as many sequences
together, up to the number of slots.
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
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from benchmarks import tables
from benchmarks.decoding import random_tokens
from benchmarks.measure import Effort
from benchmarks.train_steps import change, load_config
from simplernn_jax.checkpoint.checkpointer import Checkpointer
from simplernn_jax.inference import generate
from simplernn_jax.models import LanguageModel
from simplernn_jax.training.preparation import prepare

CLIENTS, SLOTS = (1, 8, 32, 64), 32
PROMPT, NEW_TOKENS = 100, 256
BLOCK = 8
"""Tokens of a block of the server while it streams."""
ROOT = Path(__file__).parents[1]


class Stream(NamedTuple):
    """Seconds from the request to the first text and to the end, and the number of new tokens."""

    first: float
    end: float
    tokens: int


def run(effort: Effort) -> dict[str, Any]:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        model = save_untrained(folder)
        with serving(folder, f"--slots={SLOTS}") as (_, url):
            results = compare(model, url, effort)
    tables.show("serve: base", results["clients"])
    tables.show("serve: a prompt beside 16 streams", results["half loaded"])
    return results


def compare(model: LanguageModel, url: str, effort: Effort) -> dict[str, Any]:
    """``clients``: a row for each number of them; ``half loaded``: latency beside 16 streams."""
    rows = []
    for clients in CLIENTS:
        prompts = random_tokens(model.config, clients, PROMPT)
        rates: dict[str, list[float]] = {"HTTP": [], "generate": []}
        streams: list[Stream] = []
        for block in range(effort.blocks + 1):
            # Other prompts in each block, or the prefix cache would have them.
            prompts = (prompts + 1) % model.config.vocab_size
            seconds, found = asyncio.run(stream_all(url, prompts, NEW_TOKENS))
            start = time.perf_counter()
            tokens = generate(model, prompts[:SLOTS], max_new_tokens=NEW_TOKENS).tokens
            in_process = time.perf_counter() - start
            if block:  # the first one warms up
                streams += found
                rates["HTTP"].append(sum(stream.tokens for stream in found) / seconds)
                rates["generate"].append(tokens.size / in_process)
        firsts = [1e3 * stream.first for stream in streams]
        between = [1e3 * (s.end - s.first) / (s.tokens - BLOCK) for s in streams]
        ratios = np.divide(rates["HTTP"], rates["generate"])
        rows.append(
            {"clients": clients}
            | {f"{name} tokens/s": float(np.median(rate)) for name, rate in rates.items()}
            | {"ratio": float(np.median(ratios))}
            | percentiles("first token, ms", firsts)
            | percentiles("per token, ms", between)
        )
    return {"clients": rows, "half loaded": [asyncio.run(half_loaded(model, url, effort))]}


async def half_loaded(model: LanguageModel, url: str, effort: Effort) -> dict[str, Any]:
    """Time to the first token of one more prompt, while half of the slots stream."""
    prompts = random_tokens(model.config, SLOTS // 2, PROMPT)
    start = time.perf_counter()
    others = asyncio.ensure_future(stream_all(url, prompts, 20 * NEW_TOKENS))
    await asyncio.sleep(0.5)
    firsts: list[float] = []
    while len(firsts) < 4 * effort.blocks * effort.calls and not others.done():
        prompt = (prompts[:1] + len(firsts) + 1) % model.config.vocab_size
        _, (stream,) = await stream_all(url, prompt, BLOCK)
        firsts.append(1e3 * stream.first)
    _, streams = await others
    seconds = time.perf_counter() - start
    block = 1e3 * BLOCK * seconds * len(streams) / sum(stream.tokens for stream in streams)
    return percentiles("first token, ms", firsts) | {"block, ms": block}


def percentiles(name: str, values: Sequence[float]) -> dict[str, float]:
    """Columns of the median and the 99th percentile."""
    return {f"{name}, p{p}": float(np.percentile(values, p)) for p in (50, 99)}


async def stream_all(url: str, prompts: np.ndarray, tokens: int) -> tuple[float, list[Stream]]:
    """Stream a completion of each prompt, all at once; the seconds of all, and each of them."""
    start = time.perf_counter()
    streams = await asyncio.gather(*(stream_one(url, prompt, tokens) for prompt in prompts))
    return time.perf_counter() - start, list(streams)


async def stream_one(url: str, prompt: np.ndarray, tokens: int) -> Stream:
    """Stream a completion over a connection of its own."""
    fields = {
        "prompt": prompt.tolist(),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body = json.dumps(fields).encode()
    address = urllib.parse.urlsplit(url)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(head.encode() + body)
    first, last = 0.0, b""
    async for line in reader:
        if line.startswith(b"data: [DONE]"):
            break
        if line.startswith(b"data: "):
            first = first or time.perf_counter() - start
            last = line
    end = time.perf_counter() - start
    writer.close()
    usage = json.loads(last.removeprefix(b"data: "))["usage"]
    return Stream(first, end, usage["completion_tokens"])


def save_untrained(workdir: str) -> LanguageModel:
    """Save a checkpoint of an untrained `base` model; return the model."""
    source = Path(workdir, "text.txt")
    source.write_text("A text. " * 1000, encoding="utf-8")
    config = change(load_config("base", 1, 256), source=str(source), sample_every=0)
    config, corpus = prepare(config, workdir)
    model = LanguageModel(config.model, rngs=nnx.Rngs(0))
    tokenizer_json = corpus.tokenizer.to_json()
    checkpointer = Checkpointer(workdir, config, tokenizer_json, keep_last=2, keep_best=0)
    checkpointer.save(1, {"params": nnx.state(model, nnx.Param)}, {})
    checkpointer.close()
    return model


@contextlib.contextmanager
def serving(workdir: object, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start ``scripts/serve.py`` on a free port; yield its process and URL once it is ready."""
    # An editable install leaves the name of its path hook in sys.path, which is not a folder.
    path = os.pathsep.join([str(ROOT), *filter(os.path.isabs, sys.path)])
    process = subprocess.Popen(
        [sys.executable, "scripts/serve.py", f"--workdir={workdir}", "--port=0", *flags],
        stderr=subprocess.PIPE,
        cwd=ROOT,
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
        process.kill()
        process.communicate()
