"""Texts that are edited at any place, with and without the states of what they were before."""

import dataclasses
import functools
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from simplernn_jax.config import ModelConfig
from simplernn_jax.data.tokenizer import ByteTokenizer
from simplernn_jax.inference.decoder_weights import decodes_natively
from simplernn_jax.inference.sampling import Sampling
from simplernn_jax.models import LanguageModel
from simplernn_jax.serving.jobs import Event, Job, NewTokens, Prefilled
from simplernn_jax.serving.prefill import GRID
from simplernn_jax.serving.scheduler import Scheduler
from simplernn_jax.serving.states import load_cache, save_cache

from . import Case, run_cases

VOCAB, STOP = 31, 30
CACHE_BYTES = 1 << 24
"""More than the states of a case."""


def edits(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Edited, continued and forked texts get the bytes of a server without a cache.

    Answers become parts of texts, states are evicted, and the server is restarted. As long as no
    state is lost, at most `GRID` tokens are prefilled again. One case in 101 has a model that XLA
    decodes, whose answers are prefilled again.
    """
    yield from run_cases(functools.partial(_run, folder), count, seed)


@functools.cache
def _model(mixer: str) -> LanguageModel:
    sizes: dict[str, Any] = dict.fromkeys(("hidden_dim", "key_dim", "value_dim", "mlp_dim"), 8)
    config = ModelConfig(block="parallel", mixer=mixer, num_heads=1, vocab_size=VOCAB, **sizes)
    return LanguageModel(config, rngs=nnx.Rngs(0))


@functools.cache
def _scheduler(mixer: str, cache_bytes: int) -> Scheduler:
    return Scheduler(_model(mixer), 3, cache_bytes)


def _run(folder: Path, number: int, draw: random.Random) -> Case:
    mixer = "simple_rnn,attention" if number % 101 == 50 else "simple_rnn"
    is_native = decodes_natively(_model(mixer))
    scheduler, without_cache = _scheduler(mixer, CACHE_BYTES), _scheduler(mixer, 0)
    cache, done = scheduler.cache, list[str]()
    cache.evict(0)
    texts = [_tokens(draw, draw.randrange(1, 200))]
    cached, most = [texts[0][:0]], float(GRID)
    """Texts that were prefilled, and how much of them may be prefilled again."""
    for _ in range(draw.randrange(2, 6)):
        jobs, kinds = [], draw.choices(("append", "edit", "fork"), k=draw.choice((1, 1, 2)))
        for kind in kinds:
            text = draw.choice(texts)
            start = len(text) if kind == "append" else draw.randrange(len(text) + 1)
            end = draw.randint(start, len(text)) if kind == "edit" else len(text)
            new = _tokens(draw, draw.choice((1, 1, 5, 70)))
            jobs.append(_job(draw, np.concatenate([text[:start], new, text[end:]])))
        found = _results(scheduler, [dataclasses.replace(job) for job in jobs])
        done += [*kinds]
        wanted = _results(without_cache, jobs)
        for job, result, expected in zip(jobs, found, wanted, strict=True):
            common = max(_common(job.tokens, text) for text in cached)
            if result[1:] != expected[1:]:
                return Case(f"{mixer}: {', '.join(done)}", "other bytes than without a cache")
            if (replayed := common - result[0]) > most:
                return Case(f"{mixer}: {', '.join(done)}", f"{replayed} tokens prefilled again")
        for job, (_, answer, *_) in zip(jobs, found, strict=True):
            read = answer[:-1] if answer[-1:] == [*job.sampling.stop_ids] else answer
            whole = np.concatenate([job.tokens, np.array(read, np.int32)])
            texts.append(whole[: draw.randint(len(job.tokens), len(whole))])  # a stop string
            cached.append(whole if is_native and job.cached_at is None else job.tokens)
        fate = draw.choice(("none", "none", "evict", "restart"))
        if fate == "evict":
            most = math.inf  # states before those that are left may be lost
            cache.evict(int(draw.random() * cache.num_bytes))
        elif fate == "restart":
            save_cache(folder / "cache", scheduler, ByteTokenizer())
            cache.evict(0)
            load_cache(folder / "cache", scheduler, ByteTokenizer())
            cached = cached if is_native else cached[:1]
        done += [fate]
    return Case(", ".join(done), None, mixer)


def _tokens(draw: random.Random, count: int) -> np.ndarray:
    return np.array(draw.choices(range(VOCAB), k=count), np.int32)


def _job(draw: random.Random, tokens: np.ndarray) -> Job:
    return Job(
        tokens,
        Sampling(
            temperature=draw.choice((0.0, 1.0)),
            seed=draw.randrange(9),
            stop_ids=draw.choice(((), (STOP,))),
        ),
        max_tokens=draw.choice((0, 3, 80, 150)),
        num_logprobs=2,
        cached_at=draw.choice((None, None, (), (len(tokens) // 2,))),
        keeps_state=True,
        is_streamed=draw.random() < 0.5,
    )


def _results(scheduler: Scheduler, jobs: list[Job]) -> list[tuple[int, list[int], bytes]]:
    """Run jobs together; return cached tokens, new ones, and the bytes of all other results."""
    events: dict[Job, list[Event]] = {job: [] for job in jobs}
    scheduler.waiting.extend(jobs)
    while not scheduler.is_idle:
        for job, event in scheduler.step():
            events[job].append(event)
    results = []
    for prefilled, *new in events.values():
        assert isinstance(prefilled, Prefilled)
        parts = [event for event in new if isinstance(event, NewTokens)]
        tokens = [token for event in parts for token in event.tokens.tolist()]
        logprobs = b"".join(event.logprobs.top.tobytes() for event in parts if event.logprobs)
        state = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(prefilled.state))
        results.append((prefilled.cached_tokens, tokens, logprobs + state))
    return results


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Return the number of tokens with which both begin."""
    length = min(len(a), len(b))
    return int(np.cumprod(a[:length] == b[:length]).sum())
