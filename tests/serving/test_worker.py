"""The worker's thread: failures, reloads and clients that leave."""

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
from simplernn_jax.inference.sampling import Sampling
from simplernn_jax.serving.jobs import Failed, Job, NewTokens
from simplernn_jax.serving.requests import RequestError
from simplernn_jax.serving.scheduler import Scheduler
from simplernn_jax.serving.service import Service
from simplernn_jax.serving.worker import QueueFullError, Worker, WorkerStoppedError

PROMPT = np.arange(5, dtype=np.int32)


class Running:
    """An worker whose events are collected."""

    def __init__(self, **options):
        self.model = small_model()
        self.events, self.failures, self.changed = [], [], threading.Condition()
        options = {"num_slots": 2, "cache_bytes": 0, "max_waiting": 9} | options
        self.worker = Worker(self.model, **options)

    def start(self):
        self.worker.start(self.receive, self.failures.append)

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
    running.start()
    yield running
    running.worker.stop(0)


def job(**options):
    return Job(PROMPT, Sampling(), **{"max_tokens": 3} | options)


def test_a_failing_step_ends_its_jobs_and_the_worker_goes_on(running, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(running.worker.scheduler, "_dispatch", mock.Mock(side_effect=ValueError))
        first = job()
        running.worker.submit(first)
        assert "could not compute this" in running.wait_for(first).message
    second = job()
    running.worker.submit(second)
    assert isinstance(running.wait_for(second), NewTokens)


def test_an_worker_that_cannot_go_on_says_so(running, monkeypatch):
    fail = mock.Mock(side_effect=MemoryError)
    monkeypatch.setattr(running.worker.scheduler, "_dispatch", fail)
    monkeypatch.setattr(running.worker.scheduler, "reset", fail)
    first = job()
    running.worker.submit(first)
    assert isinstance(running.wait_for(first), Failed)
    running.worker.stop(5)
    assert [type(error) for error in running.failures] == [MemoryError]
    with pytest.raises(WorkerStoppedError):
        running.worker.submit(job())


def test_jobs_after_a_reload_have_the_new_parameters(running):
    long = job(max_tokens=10**6)
    running.worker.submit(long)
    scheduler = running.worker.make_scheduler(running.model)
    running.worker.use_scheduler(scheduler)
    assert running.worker.scheduler is scheduler
    new = job()
    running.worker.submit(new)
    assert isinstance(running.wait_for(new), NewTokens)
    assert not any(isinstance(e, Failed) for _, e in running.events)
    long.is_cancelled = True


def service_of(running, new_model, note_use):
    """A service whose newest checkpoint is `new_model`."""
    vocab_size = running.model.config.vocab_size
    options = "model", mock.Mock(), None, lambda: (new_model, note_use)
    return Service(running.worker, ByteTokenizer(), vocab_size, *options)


def test_a_failed_reload_is_tried_again(running):
    note_use = mock.Mock()
    service = service_of(running, running.model, note_use)

    async def reload_twice():
        failing = mock.patch.object(running.worker, "make_scheduler", side_effect=MemoryError)
        with failing, pytest.raises(MemoryError):
            await service.reload()
        note_use.assert_not_called()
        return await service.reload()

    assert asyncio.run(reload_twice())
    note_use.assert_called_once()


def test_a_job_that_pauses_goes_on_and_holds_up_nobody(running):
    unread, other = job(unread_since=time.monotonic()), job()
    running.worker.submit(unread)
    running.worker.submit(other)
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
                running.worker.submit(one)
                taken += 1
        return taken

    assert num_taken() == 3  # none has a slot yet
    running.start()
    while running.worker.num_waiting != 1:
        time.sleep(0.01)
    assert num_taken() == 0
    for one in jobs:
        one.is_cancelled = True
    running.worker.stop(5)


def test_a_diverged_model_is_not_served(running):
    diverged = small_model()
    nnx.update(diverged, jax.tree.map(lambda x: x * jnp.nan, nnx.state(diverged, nnx.Param)))
    with pytest.raises(UserError, match="the model's logits are not finite"):
        list(Scheduler(diverged, 1, 0).compile())
    scheduler = running.worker.scheduler
    with pytest.raises(RequestError, match="the model's logits are not finite") as raised:
        asyncio.run(service_of(running, diverged, mock.Mock()).reload())
    assert raised.value.status == 409
    assert running.worker.scheduler is scheduler


def test_cancelled_jobs_leave_the_queue():
    running = Running(num_slots=1)
    running.start()
    busy = job(max_tokens=10**6)
    running.worker.submit(busy)
    waiting = [job() for _ in range(9)]
    while running.worker.num_waiting:
        time.sleep(0.01)
    running.worker.submit(*waiting)
    for one in waiting:
        one.is_cancelled = True
    while running.worker.num_waiting:
        time.sleep(0.01)
    more = [job() for _ in range(9)]
    running.worker.submit(*more)
    busy.is_cancelled = True
    assert isinstance(running.wait_for(more[-1]), NewTokens)
    running.worker.stop(5)
