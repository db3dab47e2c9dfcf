"""The thread that computes: it takes jobs from a bounded queue and reports their events."""

import threading
import time
from collections.abc import Callable

from absl import logging

from simplernn_jax.models import LanguageModel
from simplernn_jax.serving.jobs import Event, Failed, Job, NewTokens
from simplernn_jax.serving.prefill import PrefixCache
from simplernn_jax.serving.scheduler import Scheduler

STALL_SECONDS = 0.02
"""Time between two looks at jobs that all pause."""


class QueueFullError(Exception):
    """More jobs wait than the queue holds."""


class WorkerStoppedError(Exception):
    """The worker takes no more jobs."""


class Worker:
    """Runs a `Scheduler` in its own thread; all methods may be called from any thread.

    At most `max_waiting` jobs wait for a slot, and as many more as slots are free.
    """

    def __init__(
        self, model: LanguageModel, *, num_slots: int, cache_bytes: int, max_waiting: int
    ) -> None:
        self.num_slots = num_slots
        self.max_waiting = max_waiting
        self.cache_bytes = cache_bytes
        self.num_tokens = 0
        """New tokens so far."""
        self._schedulers = [Scheduler(model, num_slots, cache_bytes)]
        self.num_waiting = 0
        """Number of jobs that wait for a slot."""
        self.room = max_waiting + num_slots
        """Number of jobs that `submit` takes now."""
        self._is_stopping = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler of new jobs."""
        return self._schedulers[-1]

    @property
    def cache(self) -> PrefixCache:
        """The prefix cache of new jobs."""
        return self.scheduler.cache

    @property
    def num_active(self) -> int:
        """Number of slots that decode."""
        return sum(scheduler.num_active for scheduler in self._schedulers)

    def start(
        self,
        on_events: Callable[[list[tuple[Job, Event]]], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        """Start the thread, which calls `on_events` with the events of each step, and `on_failure`
        if it ends by an error.
        """
        self._on_events, self._on_failure = on_events, on_failure
        self._thread.start()

    def submit(self, *jobs: Job) -> None:
        """Queue all `jobs`, or none; raises QueueFullError, or WorkerStoppedError after `stop`."""
        with self._wake:
            if self._is_stopping:
                raise WorkerStoppedError
            if len(jobs) > self.room:
                raise QueueFullError
            self.room -= len(jobs)
            self.num_waiting += len(jobs)
            self.scheduler.waiting.extend(jobs)
            self.scheduler.is_stalled = False
            self._wake.notify()

    def make_scheduler(self, model: LanguageModel) -> Scheduler:
        """Make the argument of `use_scheduler`, for parameters of the same architecture."""
        scheduler = Scheduler(model, self.num_slots, self.cache_bytes)
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
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_work():
                for scheduler in self._schedulers:
                    self._report(self._step(scheduler))
        except BaseException as error:
            with self._wake:
                self._is_stopping = True
            self._report(self._fail_all("the server has failed"))
            self._on_failure(error)

    def _step(self, scheduler: Scheduler) -> list[tuple[Job, Event]]:
        try:
            return scheduler.step()
        except Exception as error:  # such as lack of memory: other jobs may fit
            logging.exception("a step of the server failed")
            failed = Failed(f"{type(error).__name__}: the server could not compute this")
            self._report(scheduler.fail_all(failed))
        scheduler.reset()
        return []

    def _fail_all(self, message: str) -> list[tuple[Job, Event]]:
        failed = Failed(message)
        return [event for scheduler in self._schedulers for event in scheduler.fail_all(failed)]

    def _take_work(self) -> bool:
        """Wait for work; return False once the worker has stopped."""
        with self._wake:
            while True:
                self._schedulers = [
                    scheduler
                    for scheduler in self._schedulers
                    if scheduler is self.scheduler or not scheduler.is_idle
                ]
                for scheduler in self._schedulers:
                    scheduler.drop_cancelled()
                is_idle = all(scheduler.is_idle for scheduler in self._schedulers)
                if self._is_stopping and (is_idle or time.monotonic() > self._deadline):
                    break
                self.num_waiting = sum(scheduler.num_waiting for scheduler in self._schedulers)
                num_free = self.num_slots - self.scheduler.num_active
                self.room = self.max_waiting + num_free - self.num_waiting
                if not is_idle:
                    if all(
                        scheduler.is_idle or scheduler.is_stalled for scheduler in self._schedulers
                    ):
                        self._wake.wait(STALL_SECONDS)
                    return True
                self._wake.wait()
        self._report(self._fail_all("the server is stopping"))
        return False

    def _report(self, events: list[tuple[Job, Event]]) -> None:
        new = (event.tokens for _, event in events if isinstance(event, NewTokens))
        self.num_tokens += sum(map(len, new))
        if events:
            self._on_events(events)
