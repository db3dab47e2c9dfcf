"""The worker's thread: failures, reloads and clients that leave."""

import threading
import time
from unittest import mock

import numpy as np
import pytest
from small_runs import small_model

from simplernn_jax.inference.sampling import Sampling
from simplernn_jax.serving.jobs import Failed, Job, NewTokens
from simplernn_jax.serving.requests import RequestError
from simplernn_jax.serving.worker import Worker

PROMPT = np.arange(5, dtype=np.int32)


class Running:
    """A worker whose events are collected."""

    def __init__(self):
        self.model = small_model()
        self.worker = Worker(self.model, num_slots=2, cache_bytes=0, max_waiting=9)
        self.events, self.failure, self.changed = [], None, threading.Condition()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        try:
            self.worker.run(self.receive)
        except MemoryError as error:
            self.failure = error

    def stop(self):
        self.worker.stop(0)
        self.thread.join()

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
    yield running
    running.stop()


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


def test_a_worker_that_cannot_go_on_says_so(running, monkeypatch):
    fail = mock.Mock(side_effect=MemoryError)
    monkeypatch.setattr(running.worker.scheduler, "_dispatch", fail)
    monkeypatch.setattr(running.worker.scheduler, "reset", fail)
    first = job()
    running.worker.submit(first)
    assert isinstance(running.wait_for(first), Failed)
    running.stop()
    assert isinstance(running.failure, MemoryError)
    with pytest.raises(RequestError, match="stopping") as error:
        running.worker.submit(job())
    assert error.value.status == 503


def test_a_job_that_pauses_goes_on_and_holds_up_nobody(running):
    paused, other = job(is_paused=True), job()
    running.worker.submit(paused)
    running.worker.submit(other)
    assert isinstance(running.wait_for(other), NewTokens)
    assert not [e for j, e in running.events if j is paused and isinstance(e, NewTokens)]
    paused.is_paused = False
    assert isinstance(running.wait_for(paused), NewTokens)


def test_the_queue_has_room_for_free_slots_and_for_jobs_that_wait():
    worker = Worker(small_model(), num_slots=2, cache_bytes=0, max_waiting=1)
    with pytest.raises(RequestError, match="prompt: 4 prompts; the limit is 3") as error:
        worker.submit(*(job() for _ in range(4)))
    assert error.value.status == 400  # however often it is sent
    worker.submit(job(), job(), job())
    with pytest.raises(RequestError, match="3 prompts waiting; try again later") as error:
        worker.submit(job())
    assert error.value.status == 429


def test_cancelled_jobs_leave_the_queue(running):
    busy = [job(max_tokens=10**6) for _ in range(2)]
    running.worker.submit(*busy)
    while running.worker.num_active < 2:
        time.sleep(0.01)
    waiting = [job() for _ in range(9)]
    running.worker.submit(*waiting)
    for one in waiting:
        one.is_cancelled = True
    while running.worker.num_waiting:
        time.sleep(0.01)
    more = [job() for _ in range(9)]
    running.worker.submit(*more)
    for one in busy:
        one.is_cancelled = True
    assert isinstance(running.wait_for(more[-1]), NewTokens)
