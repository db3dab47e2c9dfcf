"""The engine's thread: failures, reloads and clients that leave."""

import asyncio
import contextlib
import threading
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_runs import small_model

from simplernn_jax.data.tokenizer import ByteTokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.serving.decoder import Decoder
from simplernn_jax.serving.engine import Engine, EngineStoppedError, QueueFullError
from simplernn_jax.serving.jobs import Failed, Job, NewTokens, Sampling
from simplernn_jax.serving.requests import RequestError
from simplernn_jax.serving.service import Service

PROMPT = np.arange(5, dtype=np.int32)


class Running:
    """An engine whose events are collected."""

    def __init__(self, **options):
        self.model = small_model()
        self.events, self.failures, self.changed = [], [], threading.Condition()
        options = {"num_slots": 2, "cache_bytes": 0, "max_waiting": 9} | options
        self.engine = Engine(
            self.model, **options, on_events=self.receive, on_failure=self.failures.append
        )

    def receive(self, events):
        with self.changed:
            self.events += events
            self.changed.notify_all()

    def wait_for(self, job):
        """Return the last event of `job`."""

        def last():
            ends = [e for j, e in self.events if j is job]
            return [e for e in ends if isinstance(e, Failed) or getattr(e, "finish_reason", None)]

        with self.changed:
            assert self.changed.wait_for(last, timeout=60)
            return last()[-1]


@pytest.fixture
def running():
    running = Running()
    running.engine.start()
    yield running
    running.engine.stop(0)


def job(**options):
    return Job(PROMPT, Sampling(), **{"max_tokens": 3} | options)


def test_a_failing_step_ends_its_jobs_and_the_engine_goes_on(running, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(running.engine.decoder, "_dispatch", mock.Mock(side_effect=ValueError))
        first = job()
        running.engine.submit(first)
        assert "could not compute this" in running.wait_for(first).message
    second = job()
    running.engine.submit(second)
    assert isinstance(running.wait_for(second), NewTokens)


def test_an_engine_that_cannot_go_on_says_so(running, monkeypatch):
    fail = mock.Mock(side_effect=MemoryError)
    monkeypatch.setattr(running.engine.decoder, "_dispatch", fail)
    monkeypatch.setattr(running.engine.decoder, "reset", fail)
    first = job()
    running.engine.submit(first)
    assert isinstance(running.wait_for(first), Failed)
    running.engine.stop(5)
    assert [type(error) for error in running.failures] == [MemoryError]
    with pytest.raises(EngineStoppedError):
        running.engine.submit(job())


def test_jobs_after_a_reload_have_the_new_parameters(running):
    long = job(max_tokens=10**6)
    running.engine.submit(long)
    decoder = running.engine.make_decoder(running.model)
    running.engine.use_decoder(decoder)
    assert running.engine.decoder is decoder
    new = job()
    running.engine.submit(new)
    assert isinstance(running.wait_for(new), NewTokens)
    assert not any(isinstance(e, Failed) for _, e in running.events)
    long.is_cancelled = True


def test_a_failed_reload_is_tried_again(running):
    used = []
    service = Service(
        running.engine,
        ByteTokenizer(),
        running.model.config.vocab_size,
        "model",
        mock.Mock(),
        None,
        lambda: (running.model, lambda: used.append(True)),
    )

    async def reload_twice():
        failing = mock.patch.object(running.engine, "make_decoder", side_effect=MemoryError)
        with failing, pytest.raises(MemoryError):
            await service.reload()
        assert not used
        return await service.reload()

    assert asyncio.run(reload_twice())
    assert used == [True]


def test_a_job_that_pauses_goes_on_and_holds_up_nobody(running):
    unread, other = job(unread_since=time.monotonic()), job()
    running.engine.submit(unread)
    running.engine.submit(other)
    assert isinstance(running.wait_for(other), NewTokens)
    assert not [e for j, e in running.events if j is unread and isinstance(e, NewTokens)]
    unread.unread_since = None
    assert isinstance(running.wait_for(unread), NewTokens)


def test_jobs_for_free_slots_do_not_count_as_waiting():
    running = Running(num_slots=2, max_waiting=1)
    jobs = [job(max_tokens=10**6) for _ in range(6)]

    def num_taken():
        taken = 0
        for one in jobs:
            with contextlib.suppress(QueueFullError):
                running.engine.submit(one)
                taken += 1
        return taken

    assert num_taken() == 3  # none has a slot yet
    running.engine.start()
    while running.engine.num_waiting != 1:
        time.sleep(0.01)
    assert num_taken() == 0
    for one in jobs:
        one.is_cancelled = True
    running.engine.stop(5)


def test_a_diverged_model_is_not_served(running):
    diverged = small_model()
    nnx.update(diverged, jax.tree.map(lambda x: x * jnp.nan, nnx.state(diverged, nnx.Param)))
    with pytest.raises(UserError, match="the model's logits are not finite"):
        list(Decoder(diverged, 1, 0).compile())
    decoder = running.engine.decoder
    service = Service(
        *(running.engine, ByteTokenizer(), running.model.config.vocab_size, "model"),
        *(mock.Mock(), None, lambda: (diverged, mock.Mock())),
    )
    with pytest.raises(RequestError, match="the model's logits are not finite") as raised:
        asyncio.run(service.reload())
    assert raised.value.status == 409
    assert running.engine.decoder is decoder


def test_cancelled_jobs_leave_the_queue():
    running = Running(num_slots=1)
    running.engine.start()
    busy = job(max_tokens=10**6)
    running.engine.submit(busy)
    waiting = [job() for _ in range(9)]
    while running.engine.num_waiting:
        time.sleep(0.01)
    running.engine.submit(*waiting)
    for one in waiting:
        one.is_cancelled = True
    while running.engine.num_waiting:
        time.sleep(0.01)
    more = [job() for _ in range(9)]
    running.engine.submit(*more)
    busy.is_cancelled = True
    assert isinstance(running.wait_for(more[-1]), NewTokens)
    running.engine.stop(5)
