"""The worker's thread: failures, reloads and clients that leave."""

import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
from flax import nnx
from small_runs import small_model

from simplernn_jax.inference.sampling import Sampling
from simplernn_jax.models import LanguageModel
from simplernn_jax.serving.jobs import Job, NewTokens
from simplernn_jax.serving.requests import RequestError
from simplernn_jax.serving.worker import Worker

PROMPT = np.arange(5, dtype=np.int32)


class Running:
    """A worker whose events are collected."""

    def __init__(self):
        self.model = small_model()
        self.worker = Worker(self.model, num_slots=2, cache_bytes=0, max_waiting=9)
        self.events = []
        self.ended = ThreadPoolExecutor(1).submit(self.worker.run, self.events.extend)

    def wait_for(self, job):
        """Return the last event of `job`."""
        while True:
            of_job = [event for other, event in list(self.events) if other is job]
            for event in of_job:
                if isinstance(event, RequestError) or getattr(event, "finish_reason", None):
                    return event
            time.sleep(0.001)


@pytest.fixture
def running():
    running = Running()
    yield running
    running.worker.stop(0)
    running.ended.exception(60)


def job(**options):
    return Job(PROMPT, Sampling(), **{"max_tokens": 3} | options)


def test_a_failing_step_ends_its_jobs_and_the_worker_goes_on(running, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(running.worker.scheduler, "_dispatch", mock.Mock(side_effect=ValueError))
        failing = [job(), job(num_choices=3), job(), job()]  # the last two find no slot
        running.worker.submit(*failing)
        for one in failing:
            assert "could not compute this" in running.wait_for(one).message
    other = job()
    running.worker.submit(other)
    assert isinstance(running.wait_for(other), NewTokens)


def test_a_worker_that_cannot_go_on_says_so(running, monkeypatch):
    fail = mock.Mock(side_effect=MemoryError)
    monkeypatch.setattr(running.worker.scheduler, "_dispatch", fail)
    monkeypatch.setattr(running.worker, "make_scheduler", fail)
    first = job()
    running.worker.submit(first)
    assert isinstance(running.wait_for(first), RequestError)
    assert isinstance(running.ended.exception(60), MemoryError)
    with pytest.raises(RequestError, match="stopping") as error:
        running.worker.submit(job())
    assert error.value.status == 503


def test_newer_parameters_do_not_disturb_running_jobs(running):
    def tokens_of(job):
        assert running.wait_for(job).finish_reason == "length"
        return [t for j, e in running.events if j is job for t in getattr(e, "tokens", ())]

    worker, jobs = running.worker, [job(max_tokens=500) for _ in range(3)]
    worker.submit(jobs[0])
    expected = tokens_of(jobs[0])
    nnx.update(running.model, nnx.state(LanguageModel(running.model.config, rngs=nnx.Rngs(5))))
    newer = worker.make_scheduler(running.model)
    worker.submit(jobs[1])
    worker.use_scheduler(newer)
    worker.submit(jobs[2])
    assert tokens_of(jobs[1]) == expected
    assert tokens_of(jobs[2]) != expected


def test_the_queue_has_room_for_free_slots_and_for_jobs_that_wait():
    worker = Worker(small_model(), num_slots=2, cache_bytes=0, max_waiting=1)
    with pytest.raises(RequestError, match="prompt: 4 prompts; the limit is 3") as error:
        worker.submit(*(job() for _ in range(4)))
    assert error.value.status == 400  # however often it is sent
    worker.submit(job(), job(), job())
    with pytest.raises(RequestError, match="3 prompts waiting; try again later") as error:
        worker.submit(job())
    assert error.value.status == 429
