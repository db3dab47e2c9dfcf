"""What the computing thread runs: it takes jobs from a bounded queue and reports their events."""

import threading
import time
from collections import Counter
from collections.abc import Callable

from absl import logging

from simplernn_jax.errors import counted
from simplernn_jax.models import LanguageModel
from simplernn_jax.serving.jobs import Event, Job, NewTokens, Prefilled
from simplernn_jax.serving.requests import RequestError
from simplernn_jax.serving.scheduler import Scheduler

STALL_SECONDS = 0.02
"""Time between two looks at jobs that all pause."""


class Worker:
    """Runs a `Scheduler` in the thread that calls `run`; other methods are for any thread.

    At most `max_waiting` jobs wait for a slot, and as many more as slots are free.
    """

    def __init__(
        self, model: LanguageModel, num_slots: int, cache_bytes: int, max_waiting: int
    ) -> None:
        self.num_slots = num_slots
        self.max_waiting = max_waiting
        self.totals = Counter(prompt_tokens_total=0, cached_tokens_total=0, new_tokens=0)
        """Tokens since the start."""
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
                for job, event in events:
                    if isinstance(event, Prefilled):
                        self.totals["prompt_tokens_total"] += len(job.tokens)
                        self.totals["cached_tokens_total"] += event.cached_tokens
                    elif isinstance(event, NewTokens):
                        self.totals["new_tokens"] += len(event.tokens)
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
