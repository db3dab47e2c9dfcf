"""Long runs and a long-lived server: memory, files, threads and speed stay as they are."""

import asyncio
import contextlib
import itertools
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from simplernn_jax.training.metrics import read_metrics

from ..http_client import body_of, parts_of
from ..measure import resident_bytes
from ..serving import save_untrained, serving
from ..train_steps import load_config
from .experiment import Case
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
MAX_SLOWDOWN = 1.5
"""Time per step, or of a request, in the last quarter over that in the second, each of the fastest:
another process on the machine slows down single ones."""
MAX_POOL = min(32, (os.cpu_count() or 1) + 4)
"""Threads of the pool of asyncio, which starts one whenever none is idle, up to this number."""
_LOG_EVERY, _EVALUATE_EVERY, _SAMPLE_EVERY = 10, 50, 100
_CLIENTS = 8
_TIMED = 5

_Value = TypeVar("_Value")


class Sample(NamedTuple):
    """Resources that a process uses."""

    memory: float
    files: int
    threads: int
    seconds: float = 0.0
    """Fastest of some equal requests to a server."""


def soak(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Train `count` times `STEPS` steps, and send a server `count` times `REQUESTS` requests."""
    yield from _train(folder / "run", count * STEPS)
    yield from _serve(folder, count * REQUESTS, seed)


def _train(workdir: Path, num_steps: int) -> Iterator[Case]:
    """Run many short steps with evaluations, saves, samples and rows of metrics."""
    model = {"num_layers": 1, "hidden_dim": 8, "key_dim": 8, "value_dim": 8, "num_heads": 1}
    train = {"steps": num_steps, "log_every": _LOG_EVERY, "save_every": num_steps // SAVES}
    train |= {"eval_every": _EVALUATE_EVERY, "eval_tokens": 256, "sample_every": _SAMPLE_EVERY}
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
    rows = [row for row in read_metrics(str(workdir)) if row["kind"] == "train"]
    _, second, _, last = _quarters([row["tokens_per_second"] for row in rows])
    yield _compare_times(f"{num_steps:,} steps", max(second) / max(last))


def _serve(folder: Path, number: int, seed: int) -> Iterator[Case]:
    """Send requests of all kinds, some of clients that leave."""
    config = load_config("tiny", 2, 64)
    config.data.source = str(write_text(folder / "corpus.txt"))
    config.train.sample_every = 0
    save_untrained(config, folder / "untrained")
    flags = ["--slots=4", "--cache_mb=1", f"--state_dir={folder / 'states'}"]
    with serving(folder / "untrained", *flags) as (process, url):
        samples, wrong = asyncio.run(_send_all(url, process.pid, number, seed))
        ended = process.poll()
    yield Case(f"{number:,} requests, exit code {ended}", None if ended is None else "ended")
    yield Case(f"{number:,} requests, {len(wrong)} wrong answers", "; ".join(wrong[:5]) or None)
    yield from _compare(f"{number:,} requests", samples, MAX_GROWTH, MAX_POOL)
    _, second, _, last = _quarters([sample.seconds for sample in samples])
    yield _compare_times(f"{number:,} requests", min(last) / min(second))


async def _send_all(url: str, pid: int, number: int, seed: int) -> tuple[list[Sample], list[str]]:
    """Return samples between batches of requests, and the answers that are not as expected."""
    samples, wrong = [], []
    for start in range(0, number, _CLIENTS):
        draws = [random.Random(f"{seed} {start + i}") for i in range(min(_CLIENTS, number - start))]
        for problem in await asyncio.gather(*(_send(url, draw) for draw in draws)):
            if problem is not None:
                wrong.append(problem)
        if not start % (5 * _CLIENTS):
            await _wait_until_idle(url)
            seconds = await _time_request(url)
            samples.append(_sample(pid)._replace(seconds=seconds))
    return samples, wrong


async def _time_request(url: str) -> float:
    """Time of the fastest of some equal requests."""
    body = {"prompt": "abc", "max_tokens": 20, "ignore_eos": True, "temperature": 0}
    times = []
    for _ in range(_TIMED):
        start = time.perf_counter()
        answer = await _answer(url, "POST", "/v1/completions", body)
        times.append(time.perf_counter() - start)
        if answer.split()[1:2] != [b"200"]:
            raise RuntimeError(f"an answer of a running server: {answer[:200]!r}")
    return min(times)


async def _wait_until_idle(url: str) -> None:
    """Wait until the requests of clients that left are cancelled."""
    while json.loads(await body_of(url, "/slots"))["active"]:
        await asyncio.sleep(0.01)


async def _send(url: str, draw: random.Random) -> str | None:
    """Send a request of a random kind; describe an answer that is not as expected."""
    prompt = "".join(draw.choices("abcdefgh \n", k=draw.randint(1, 200)))
    name = f"s{draw.getrandbits(60)}"
    body = {"prompt": prompt, "max_tokens": draw.randint(1, 40), "ignore_eos": True}
    completions, states = "/v1/completions", "/v1/states"
    kinds: list[tuple[str, str, object, bytes, bool]] = [
        ("POST", completions, body, b"200", False),
        ("POST", completions, body | {"stream": True, "n": 2, "logprobs": 3}, b"200", False),
        ("POST", completions, body | {"stream": True, "max_tokens": 10**6}, b"200", True),
        ("POST", completions, body | {"max_tokens": 10**6}, b"200", True),
        ("POST", completions, body | {"temperature": "hot"}, b"400", False),
        ("POST", completions, prompt, b"400", False),
        ("POST", "/v1/chat/completions", {"messages": []}, b"400", False),
        ("POST", "/tokenize", {"prompt": prompt}, b"200", False),
        ("POST", "/detokenize", {"tokens": [97, 10**9]}, b"400", False),
        ("GET", f"/{name}", None, b"404", False),
        ("GET", f"{states}/{name}", None, b"404", False),
        ("PUT", f"{states}/{name}/file", prompt, b"400", False),
        ("GET", "/metrics", None, b"200", False),
    ]  # fmt: skip
    if draw.randrange(len(kinds) + 1) == 0:
        return await _make_and_delete_state(url, prompt, name)
    method, path, fields, expected, leaves = draw.choice(kinds)
    answer = await _answer(url, method, path, fields, leaves)
    status = answer.split()[1:2]
    return None if leaves or status == [expected] else f"{method} {path}: {answer[:200]!r}"


async def _make_and_delete_state(url: str, prompt: str, name: str) -> str | None:
    made = {"prompt": prompt, "name": name}
    one = f"/{name}"
    for method, path, fields in (("POST", "", made), ("GET", one, None), ("DELETE", one, None)):
        answer = await _answer(url, method, f"/v1/states{path}", fields)
        if not answer.split()[1:2][0].startswith(b"2"):
            return f"{method} /v1/states{path}: {answer[:200]!r}"
    return None


async def _answer(
    url: str, method: str, path: str, fields: object = None, leaves: bool = False
) -> bytes:
    """Send a request; return what comes, or leave after a moment."""
    answer = b""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.02 if leaves else None):
            async for part in parts_of(url, path, fields, method):
                answer += part
    return answer


def _sample(pid: int) -> Sample:
    folder = f"/proc/{pid}"
    files, threads = (len(os.listdir(f"{folder}/{name}")) for name in ("fd", "task"))
    return Sample(resident_bytes(pid), files, threads)


def _compare(
    what: str, samples: Sequence[Sample], max_growth: int, new_threads: int
) -> Iterator[Case]:
    """Compare the second quarter with the last one; the smallest samples, between saves."""
    _, second, _, last = _quarters(samples)
    for name, bound in (("memory", max_growth), ("files", 0), ("threads", new_threads)):
        growth = min(getattr(s, name) for s in last) - min(getattr(s, name) for s in second)
        problem = None if growth <= bound else f"{growth:,.0f} more than before"
        yield Case(f"{what}, {name} {growth:+,.0f}", problem)


def _compare_times(what: str, slowdown: float) -> Case:
    problem = None if slowdown <= MAX_SLOWDOWN else "slower"
    return Case(f"{what}, {slowdown:.2f} times the time of each", problem)


def _quarters(values: Sequence[_Value]) -> list[Sequence[_Value]]:
    """Cut a sequence into four, which have at least one value each."""
    bounds = [len(values) * quarter // 4 for quarter in range(5)]
    return [values[start : max(end, start + 1)] for start, end in itertools.pairwise(bounds)]
