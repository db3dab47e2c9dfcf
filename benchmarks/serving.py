"""The server under load: throughput and latency over HTTP, and generation in process.

Each client streams completions of its own prompts, one after the other. `generate` decodes as
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
import urllib.parse
from collections.abc import AsyncIterator, Iterator, Sequence
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

from . import measure
from .decoding import random_tokens
from .measure import Effort
from .tables import Row, Table
from .train_steps import load_config

PATHS = "HTTP", "generate"
FIRST, EACH = "first token, ms", "per token, ms"
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
    """Table of the server under load."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "text.txt")
        source.write_text("A text. " * 1000, encoding="utf-8")
        config = load_config("base", 1, 256, source=str(source), sample_every=0)
        save_untrained(config, folder)
        model, _, _ = load_model(folder)
        with serving(folder, f"--slots={SLOTS}", "--max_queue=64") as (_, url):
            rows = [compare(model, url, clients, effort) for clients in CLIENTS]
            long = compare(model, url, SLOTS, effort, tokens=LONG)
    panels = {"tokens/s": {name: curve(rows, f"{name} tokens/s") for name in PATHS}}
    panels |= {name: {"HTTP": curve(rows, f"{name}, p50")} for name in (FIRST, EACH)}
    yield Table("serve: base", rows, panels, "clients", "serving")
    yield Table(f"serve: completions of {LONG:,} tokens", [long])


def curve(rows: Sequence[Row], column: str) -> dict[str, float]:
    """A column against the number of clients."""
    return {str(row["clients"]): row[column] for row in rows}


def compare(
    model: LanguageModel, url: str, clients: int, effort: Effort, tokens: int = NEW_TOKENS
) -> Row:
    """Rates and latencies of a number of clients at once, and the rate of `generate`."""
    prompts = random_tokens(model.config, clients, COMPLETIONS * PROMPT)
    rates: dict[str, list[float]] = {name: [] for name in PATHS}
    streams: list[Stream] = []
    for block in range(effort.blocks * effort.calls + 1):
        # Other prompts each time, or the prefix cache would have them.
        prompts = (prompts + 1) % model.config.vocab_size
        seconds, found = asyncio.run(stream_all(url, prompts, tokens))
        start = time.perf_counter()
        new = generate(model, prompts[:SLOTS, :PROMPT], max_new_tokens=tokens).tokens
        in_process = time.perf_counter() - start
        if block:  # the first one warms up
            streams += found
            rates["HTTP"].append(sum(stream.tokens for stream in found) / seconds)
            rates["generate"].append(new.size / in_process)
    row: Row = {"clients": clients}
    row |= {f"{name} tokens/s": float(np.median(rate)) for name, rate in rates.items()}
    row["ratio"] = float(np.median(np.divide(rates["HTTP"], rates["generate"])))
    between = [1e3 * (s.end - s.first) / s.tokens for s in streams]
    firsts = percentiles(FIRST, [1e3 * stream.first for stream in streams])
    return row | firsts | percentiles(EACH, between)


def percentiles(name: str, values: Sequence[float]) -> dict[str, float]:
    """Columns of the median and the 99th percentile."""
    return {f"{name}, p{p}": float(np.percentile(values, p)) for p in (50, 99)}


async def stream_all(url: str, prompts: np.ndarray, tokens: int) -> tuple[float, list[Stream]]:
    """Stream completions of each row of prompts, over a connection for the row.

    A row has prompts of `PROMPT` tokens. Returns the seconds of all, and each of them.
    """

    async def client(row: np.ndarray) -> list[Stream]:
        streams = []
        async with connected(url) as (reader, writer):
            for prompt in np.split(row, COMPLETIONS):
                fields: Row = {"prompt": prompt.tolist(), "max_tokens": tokens, "temperature": 0}
                fields |= {"ignore_eos": True, "stream": True}
                fields |= {"stream_options": {"include_usage": True}}
                start = time.perf_counter()
                writer.write(request("POST", "/v1/completions", fields))
                answer, first, end = await read_stream(reader)
                number = int(re.findall(rb'"completion_tokens":(\d+)', answer)[-1])
                streams.append(Stream(first - start, end - start, number))
        return streams

    start = time.perf_counter()
    found = await asyncio.gather(*map(client, prompts))
    return time.perf_counter() - start, [stream for streams in found for stream in streams]


def save_untrained(
    config: Config, workdir: str | Path, step: int = 1, model_seed: int | None = None
) -> TokenizedCorpus:
    """Save a checkpoint of an untrained model in `workdir`; return its corpus."""
    config, corpus, _ = prepare(config, str(workdir))
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
            sys.executable,
            project.ROOT / "scripts" / "serve.py",
            f"--workdir={workdir}",
            "--port=0",
            *flags,
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


def request(method: str, path: str, fields: Any, connection: str = "keep-alive") -> bytes:
    """A request with `fields` as JSON, if there are any."""
    body = b"" if fields is None else json.dumps(fields).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: {connection}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@contextlib.asynccontextmanager
async def connected(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a connection, and close it at the end."""
    address = urllib.parse.urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def read_stream(reader: asyncio.StreamReader) -> tuple[bytes, float, float]:
    """Read a response in chunks, and when its first event and its end came.

    Raises:
      ConnectionError: the status is not 200, or the connection ended before the stream.
    """
    answer, first = bytearray(), 0.0
    while not answer.endswith(b"0\r\n\r\n"):
        part = await reader.read(1 << 16)
        answer += part
        if not part or not answer.startswith(b"HTTP/1.1 200 "):
            raise ConnectionError(f"the stream ended: {bytes(answer)!r}")
        if not first and b"data: {" in part:
            first = time.perf_counter()
    return bytes(answer), first, time.perf_counter()


async def fetch(url: str, method: str, path: str, fields: Any = None) -> tuple[int, bytes]:
    """Status and body of a response, over a new connection."""
    async with connected(url) as (reader, writer):
        writer.write(request(method, path, fields, "close"))
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    return int(head.split()[1]), body
