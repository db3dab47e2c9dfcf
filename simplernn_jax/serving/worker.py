"""What the computing thread runs: it takes jobs from a bounded queue and reports their events."""

import functools
import threading
import time
from collections.abc import Callable

from absl import logging
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from simplernn_jax.errors import counted
from simplernn_jax.models import LanguageModel
from simplernn_jax.serving.jobs import Event, Job, NewTokens
from simplernn_jax.serving.requests import RequestError
from simplernn_jax.serving.scheduler import Scheduler

STALL_SECONDS = 0.02
"""Time between two looks at jobs that all pause."""
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Bounds of the buckets of histograms, in seconds."""


class Worker:
    """Runs a `Scheduler` in the thread that calls `run`; other methods are for any thread.

    At most `max_waiting` jobs wait for a slot, and as many more as slots are free.
    """

    def __init__(
        self, model: LanguageModel, num_slots: int, cache_bytes: int, max_waiting: int
    ) -> None:
        self.num_slots = num_slots
        self.max_waiting = max_waiting
        self.num_tokens = 0
        """New tokens so far."""
        self.metrics = Metrics(self)
        self._cache_bytes = cache_bytes
        self._schedulers = [Scheduler(model, num_slots, cache_bytes)]
        """Of new jobs the last one, of older parameters the others until they are idle."""
        self._jobs: set[Job] = set()
        """Those that were submitted and not cancelled; each is cancelled once it has ended."""
        self._is_stopping = False
        self._wake = threading.Condition()

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler of new jobs."""
        return self._schedulers[-1]

    @property
    def num_active(self) -> int:
        """Number of slots that decode."""
        return sum(scheduler.num_active for scheduler in self._schedulers)

    @property
    def num_waiting(self) -> int:
        """Number of jobs without a slot."""
        return sum(scheduler.num_waiting for scheduler in self._schedulers)

    def run(self, on_events: Callable[[list[tuple[Job, Event]]], object]) -> None:
        """Compute until `stop`; calls `on_events` with the events of each step."""
        self._on_events = on_events
        try:
            while self._wait_for_work():
                self._step()
            self._fail_all("the server is stopping")
        except BaseException:
            self.stop(0)
            self._fail_all("the server has failed")
            raise

    def check_room(self, num_jobs: int = 1) -> None:
        """Raise `RequestError` if `submit` would reject so many jobs now."""
        most = self.max_waiting + self.num_slots
        if num_jobs > most:
            raise RequestError(f"prompt: {num_jobs} prompts; the limit is {most}")
        if self.num_waiting + num_jobs > most - self.scheduler.num_active:
            message = f"{counted(self.num_waiting, 'prompt')} waiting; try again later"
            raise RequestError(message, status=429)

    def submit(self, *jobs: Job) -> None:
        """Queue all `jobs`, or none; `RequestError`: 429 without room, 503 after `stop`."""
        with self._wake:
            if self._is_stopping:
                raise RequestError("the server is stopping", status=503)
            self.check_room(len(jobs))
            self.scheduler.waiting.extend(jobs)
            self._jobs.update(jobs)
            self._wake.notify()

    def cancel(self, *jobs: Job) -> None:
        """Free what `jobs` use."""
        with self._wake:
            for job in jobs:
                job.is_cancelled = True
            self._jobs.difference_update(jobs)

    def make_scheduler(self, model: LanguageModel) -> Scheduler:
        """Make the argument of `use_scheduler`, for parameters of the same architecture."""
        scheduler = Scheduler(model, self.num_slots, self._cache_bytes)
        list(scheduler.compile())  # which checks its logits
        return scheduler

    def use_scheduler(self, scheduler: Scheduler) -> None:
        """Use `scheduler` for all jobs that are submitted from now on."""
        with self._wake:
            self._schedulers = [*self._schedulers, scheduler]
            self._wake.notify()  # so that an idle worker frees the one before

    def stop(self, timeout: float) -> None:
        """Take no more jobs, finish those that were taken, or fail them after `timeout` seconds."""
        with self._wake:
            self._is_stopping = True
            self._deadline = time.monotonic() + timeout
            self._wake.notify()

    def _wait_for_work(self) -> bool:
        """Wait for work; return False once the worker has to stop."""
        with self._wake:
            while True:
                for scheduler in self._schedulers:
                    scheduler.drop_cancelled()
                *older, newest = self._schedulers
                self._schedulers = [*(old for old in older if not old.is_idle), newest]
                busy = [scheduler for scheduler in self._schedulers if not scheduler.is_idle]
                if self._is_stopping and (not busy or time.monotonic() > self._deadline):
                    return False
                if busy:
                    if all(scheduler.is_paused for scheduler in busy):
                        self._wake.wait(STALL_SECONDS)
                    return True
                self._wake.wait()

    def _step(self) -> None:
        try:
            for scheduler in self._schedulers:
                events = scheduler.step()
                new = (event.tokens for _, event in events if isinstance(event, NewTokens))
                self.num_tokens += sum(map(len, new))
                if events:
                    self._on_events(events)
        except Exception as error:  # such as lack of memory: other jobs may fit
            logging.exception("a step of the server failed")
            with self._wake:  # or a job that is submitted meanwhile would be lost
                self._fail_all(f"{type(error).__name__}: the server could not compute this")
                self._schedulers = [self.make_scheduler(self.scheduler.model)]

    def _fail_all(self, message: str) -> None:
        with self._wake:
            jobs = list(self._jobs)
        self._on_events([(job, RequestError(message, status=503)) for job in jobs])


class Metrics:
    """Prometheus metrics of a worker and its requests, read by ``GET /metrics``."""

    def __init__(self, worker: Worker) -> None:
        self._registry = CollectorRegistry()
        counter = functools.partial(Counter, namespace="simplernn", registry=self._registry)
        histogram = functools.partial(
            Histogram, namespace="simplernn", registry=self._registry, buckets=_BUCKETS
        )
        self.requests = counter("requests", "Requests by path and status.", ["path", "status"])
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = counter(
            "cached_tokens", "Tokens of prompts found in the prefix cache."
        )
        self._first_token = histogram(
            "time_to_first_token_seconds", "From submission to the first new token."
        )
        self._between_tokens = histogram(
            "inter_token_latency_seconds", "Time per new token after the first event."
        )
        for name, text, read in (
            ("slots", "Slots.", lambda: worker.num_slots),
            ("slots_active", "Slots that decode.", lambda: worker.num_active),
            ("waiting", "Prompts that wait for a slot.", lambda: worker.num_waiting),
            ("new_tokens", "New tokens since the start.", lambda: worker.num_tokens),
            ("prefix_cache_bytes", "Its size.", lambda: worker.scheduler.cache.num_bytes),
            ("prefix_cache_evicted", "States.", lambda: worker.scheduler.cache.num_evicted),
        ):
            gauge = Gauge(name, text, namespace="simplernn", registry=self._registry)
            gauge.set_function(read)

    def observe(self, num_before: int, num_new: int, seconds: float) -> None:
        """Record new tokens of a continuation, `seconds` after its last ones or its submission."""
        if num_before and num_new:
            self._between_tokens.observe(seconds / num_new)
        elif num_new:
            self._first_token.observe(seconds)

    def text(self) -> bytes:
        """Return the exposition format."""
        return generate_latest(self._registry)
