"""The thread that computes: it takes jobs from a bounded queue and reports their events."""

import threading
import time
from collections.abc import Callable

from absl import logging

from simplernn_jax.models import LanguageModel
from simplernn_jax.serving.decoder import Decoder
from simplernn_jax.serving.jobs import Event, Failed, Job, NewTokens
from simplernn_jax.serving.prefix_cache import PrefixCache

STALL_SECONDS = 0.02
"""Time between two looks at jobs that all pause."""


class QueueFullError(Exception):
    """More jobs wait than the queue holds."""


class EngineStoppedError(Exception):
    """The engine takes no more jobs."""


class Engine:
    """Runs a `Decoder` in a thread of its own; all methods may be called from any thread.

    At most `max_waiting` jobs wait for a slot, and as many more as slots are free. The engine's
    thread calls `on_events` with the events of each step, and `on_failure` if it ends by an error.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        num_slots: int,
        cache_bytes: int,
        max_waiting: int,
        on_events: Callable[[list[tuple[Job, Event]]], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self.num_slots = num_slots
        self.max_waiting = max_waiting
        self.cache_bytes = cache_bytes
        self.num_tokens = 0
        """New tokens so far."""
        self._on_events = on_events
        self._on_failure = on_failure
        self._decoders = [Decoder(model, num_slots, cache_bytes)]
        self.num_waiting = 0
        """Number of jobs that wait for a slot."""
        self.room = max_waiting + num_slots
        """Number of jobs that `submit` takes now."""
        self._is_stopping = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def decoder(self) -> Decoder:
        """The decoder of new jobs."""
        return self._decoders[-1]

    @property
    def cache(self) -> PrefixCache:
        """The prefix cache of new jobs."""
        return self.decoder.cache

    @property
    def num_active(self) -> int:
        """Number of slots that decode."""
        return sum(decoder.num_active for decoder in self._decoders)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, *jobs: Job) -> None:
        """Queue all `jobs`, or none; raises QueueFullError, or EngineStoppedError after `stop`."""
        with self._wake:
            if self._is_stopping:
                raise EngineStoppedError
            if len(jobs) > self.room:
                raise QueueFullError
            self.room -= len(jobs)
            self.num_waiting += len(jobs)
            self.decoder.waiting.extend(jobs)
            self.decoder.is_stalled = False
            self._wake.notify()

    def make_decoder(self, model: LanguageModel) -> Decoder:
        """Make the argument of `use_decoder`, for parameters of the same architecture."""
        decoder = Decoder(model, self.num_slots, self.cache_bytes)
        list(decoder.compile())  # which checks its logits
        return decoder

    def use_decoder(self, decoder: Decoder) -> None:
        """Use `decoder` for all jobs that are submitted from now on."""
        with self._wake:
            self._decoders = [*self._decoders, decoder]
            self._wake.notify()  # so that an idle engine frees the one before

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
                for decoder in self._decoders:
                    self._report(self._step(decoder))
        except BaseException as error:
            with self._wake:
                self._is_stopping = True
            self._report(self._fail_all("the server has failed"))
            self._on_failure(error)

    def _step(self, decoder: Decoder) -> list[tuple[Job, Event]]:
        try:
            return decoder.step()
        except Exception as error:  # such as lack of memory: other jobs may fit
            logging.exception("a step of the server failed")
            failed = Failed(f"{type(error).__name__}: the server could not compute this")
            self._report(decoder.fail_all(failed))
        decoder.reset()
        return []

    def _fail_all(self, message: str) -> list[tuple[Job, Event]]:
        failed = Failed(message)
        return [event for decoder in self._decoders for event in decoder.fail_all(failed)]

    def _take_work(self) -> bool:
        """Wait for work; return False once the engine has stopped."""
        with self._wake:
            while True:
                self._decoders = [
                    decoder
                    for decoder in self._decoders
                    if decoder is self.decoder or not decoder.is_idle
                ]
                for decoder in self._decoders:
                    decoder.drop_cancelled()
                is_idle = all(decoder.is_idle for decoder in self._decoders)
                if self._is_stopping and (is_idle or time.monotonic() > self._deadline):
                    break
                self.num_waiting = sum(decoder.num_waiting for decoder in self._decoders)
                num_free = self.num_slots - self.decoder.num_active
                self.room = self.max_waiting + num_free - self.num_waiting
                if not is_idle:
                    if all(decoder.is_idle or decoder.is_stalled for decoder in self._decoders):
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
