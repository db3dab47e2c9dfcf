"""Long runs and a long-lived server: memory, files and threads stay as they are."""

import asyncio
import contextlib
import json
import os
import random
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..serving import fetch, save_untrained, serving
from ..train_steps import load_config
from . import Case
from .runs import log_of, start_run, wait_for_save, write_text

STEPS, REQUESTS = 1000, 100
"""Training steps and requests of one of `count`."""
MAX_GROWTH = 16 * 2**20
"""Resident bytes that may be added from the second quarter to the last one, where each has its
smallest sample: allocators keep what one save or one batch of requests needed, some MiB, and a
full run of 100,000 steps finds a leak of 340 bytes per step."""
SETTLED, MAX_UNSETTLED_GROWTH = 20_000, 64 * 2**20
"""Steps of a run whose second quarter is after Python's first full collection, at about step 5,000,
which frees what tracing and compiling left, 100 MB; and what a shorter run may add before it."""
SAVES = 40
"""Saves of a run, however long: what `tensorstore.Spec.to_json` (0.1.86) returns, 2 kB, is never
freed, and Orbax calls it for each array. The 20 saves between those samples add 2 MiB."""
MAX_POOL = min(32, (os.cpu_count() or 1) + 4)
"""Threads of the pool of asyncio, which starts one whenever none is idle, up to this number."""
_CLIENTS = 8
_LEAVES = 0
"""In the place of the status of a request whose client does not wait."""


class Sample(NamedTuple):
    """Resources that a process uses."""

    memory: float
    files: int
    threads: int


def soak(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Long runs and servers need no more memory, files or threads.

    A run takes `count` times `STEPS` steps, and a server gets `count` times `REQUESTS` requests.
    """
    yield from _train(folder / "run", count * STEPS)
    yield from _serve(folder, count * REQUESTS, seed)


def _train(workdir: Path, num_steps: int) -> Iterator[Case]:
    """Run many short steps with evaluations, saves, samples and rows of metrics."""
    model = {"num_layers": 1, "hidden_dim": 8, "key_dim": 8, "value_dim": 8, "num_heads": 1}
    train = {"steps": num_steps, "log_every": 10, "save_every": num_steps // SAVES}
    train |= {"eval_every": 50, "eval_tokens": 256, "sample_every": 100}
    flags = [f"--config.model.{name}={value}" for name, value in model.items()]
    flags += [f"--config.train.{name}={value}" for name, value in train.items()]
    flags += ["--config.data.batch_size=1", "--config.data.sequence_length=16"]
    samples = []
    with start_run(workdir, 1, flags) as (process,):
        wait_for_save(workdir, [process], 1)  # most programs are compiled
        while process.poll() is None:
            with contextlib.suppress(OSError):  # it has just ended
                samples.append(_sample(process.pid))
            time.sleep(0.1)
    # The last sample may be of a process that ends.
    growth = MAX_GROWTH if num_steps >= SETTLED else MAX_UNSETTLED_GROWTH
    yield from _compare(f"{num_steps:,} steps", samples[:-1], growth, 0)
    problem = None if process.returncode == 0 else log_of(workdir)[-500:]
    yield Case(f"{num_steps:,} steps, exit code {process.returncode}", problem)


def _serve(folder: Path, number: int, seed: int) -> Iterator[Case]:
    """Send requests of all kinds, some of clients that leave."""
    config = load_config("tiny", 2, 64, sample_every=0)
    config.data.source = str(write_text(folder / "corpus.txt"))
    save_untrained(config, folder / "untrained")
    flags = ["--slots=4", "--cache_mb=1", f"--state_dir={folder / 'states'}"]
    with serving(folder / "untrained", *flags) as (process, url):
        samples, wrong = asyncio.run(_send_all(url, process.pid, number, seed))
        ended = process.poll()
    what = f"{number:,} requests"
    yield Case(f"{what}, exit code {ended}", None if ended is None else "ended")
    yield Case(f"{what}, {len(wrong)} wrong answers", "; ".join(wrong[:5]) or None)
    yield from _compare(what, samples, MAX_GROWTH, MAX_POOL)


async def _send_all(url: str, pid: int, number: int, seed: int) -> tuple[list[Sample], list[str]]:
    """Return samples between batches of requests, and the answers that are not as expected."""
    samples, wrong = [], []
    for start in range(0, number, _CLIENTS):
        draws = [random.Random(f"{seed} {start + i}") for i in range(min(_CLIENTS, number - start))]
        found = await asyncio.gather(*(_send(url, draw) for draw in draws))
        while json.loads((await fetch(url, "GET", "/slots"))[1])["active"]:
            await asyncio.sleep(0.01)  # until requests of clients that left are cancelled
        wrong += [problem for problem in found if problem is not None]
        samples.append(_sample(pid))
    return samples, wrong


async def _send(url: str, draw: random.Random) -> str | None:
    """Send a request of a random kind; describe an answer that is not as expected."""
    prompt = "".join(draw.choices("abcdefgh \n", k=draw.randint(1, 200)))
    completions, states = "/v1/completions", "/v1/states"
    name, body = f"s{draw.getrandbits(60)}", {"prompt": prompt, "ignore_eos": True}
    kinds: list[list[tuple[str, str, object, int]]] = [
        [("POST", completions, body | {"max_tokens": draw.randint(1, 40)}, 200)],
        [("POST", completions, body | {"stream": True, "n": 2, "logprobs": 3}, 200)],
        [("POST", completions, body | {"stream": True, "max_tokens": 10**6}, _LEAVES)],
        [("POST", completions, body | {"max_tokens": 10**6}, _LEAVES)],
        [("POST", completions, prompt, 400)],
        [("PUT", f"{states}/{name}/file", prompt, 400)],
        [("GET", "/metrics", None, 200)],
        [
            ("POST", states, {"prompt": prompt, "name": name}, 201),
            ("DELETE", f"{states}/{name}", None, 200),
        ],
    ]
    for method, path, fields, expected in draw.choice(kinds):
        try:
            async with asyncio.timeout(None if expected else 0.02):
                status, answer = await fetch(url, method, path, fields)
        except TimeoutError:
            return None  # has left
        if expected and status != expected:
            return f"{method} {path}: {status} {answer[:200]!r}"
    return None


def _sample(pid: int) -> Sample:
    """Read what a process uses; raises OSError once it has ended and was waited for."""
    folder = f"/proc/{pid}"
    pages = int(Path(folder, "statm").read_text("ascii").split()[1])
    files, threads = (len(os.listdir(f"{folder}/{name}")) for name in ("fd", "task"))
    return Sample(pages * resource.getpagesize(), files, threads)


def _compare(
    what: str, samples: Sequence[Sample], max_growth: int, new_threads: int
) -> Iterator[Case]:
    """Compare the smallest samples, between saves, of the second quarter and of the last one."""
    count = len(samples)
    for name, bound in (("memory", max_growth), ("files", 0), ("threads", new_threads)):
        values = [getattr(sample, name) for sample in samples]
        second, last = values[count // 4 : count // 2 or 1], values[3 * count // 4 :]
        growth = min(last) - min(second)
        problem = None if growth <= bound else f"{growth:,.0f} more than before"
        yield Case(f"{what}, {name} {growth:+,.0f}", problem)
