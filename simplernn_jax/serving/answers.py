"""Answers to requests as they grow: from the engine's events to text."""

import asyncio
import contextlib
import dataclasses
import math
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeVar

from simplernn_jax.serving.choice_text import ChoiceText, Piece, TokenEntry
from simplernn_jax.serving.jobs import Event, Failed, Job, Prefilled
from simplernn_jax.serving.metrics import Latency, Metrics
from simplernn_jax.serving.requests import RequestError

MAX_BACKLOG = 1024
"""Events of a request that may come while the client does not read a frame; more for many choices,
of which a step of the engine can give one each."""
_MAX_QUEUED = 16
"""Events that may be queued while a client reads, but too slowly, as a multiple of that."""
MAX_EVENTS = 64
"""Events that are handled at a time."""
LONG = 4096
"""Characters or tokens from which work is done in a thread: some ten milliseconds."""

_T = TypeVar("_T")


async def in_thread_if_long(size: int, function: Callable[..., _T], *args: Any) -> _T:
    """Call a function, in a thread if it is long: other requests are answered meanwhile.

    `size` is the number of characters or tokens that it handles.
    """
    return await asyncio.to_thread(function, *args) if size > LONG else function(*args)


@dataclasses.dataclass(eq=False)
class PromptResult:
    """Continuations of one prompt, as they grow."""

    job: Job
    prompt_text: str
    prompt_entries: list[TokenEntry] | None
    choices: list[ChoiceText]
    latencies: list[Latency]
    cached_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Update:
    """Addition of an event to one choice of a request."""

    index: int
    piece: Piece


class Answer:
    """A submitted request: iterate over `updates` until all its choices have ended."""

    def __init__(
        self,
        results: list[PromptResult],
        submit: Callable[[list[Job]], None],
        prompt_entries: Callable[[PromptResult, Prefilled], list[TokenEntry]],
        metrics: Metrics,
    ) -> None:
        self.results = results
        self._submit, self._prompt_entries, self._metrics = submit, prompt_entries, metrics
        self._queue: asyncio.Queue[tuple[Job, Event]] = asyncio.Queue()
        self._of_job = {result.job: number for number, result in enumerate(results)}
        self._num_left = len(results)
        self._max_backlog = max(MAX_BACKLOG, 16 * sum(len(r.choices) for r in results))
        self._limit = math.inf
        """Events that may be queued."""
        self._is_overrun = False
        for result in results:
            result.job.deliver = self._deliver

    def _deliver(self, job: Job, event: Event) -> None:
        """Queue an event; a client that does not read what is generated ends its request."""
        if self._is_overrun:
            return
        if self._queue.qsize() >= self._limit:
            self._is_overrun = True
            self.cancel()
            event = Failed("the client reads the stream too slowly, or not at all")
        self._queue.put_nowait((job, event))

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """Limit the events that come while a frame waits until the client reads it."""
        queued = self._queue.qsize()  # while the frame was made
        self._limit = min(queued + self._max_backlog, _MAX_QUEUED * self._max_backlog)
        yield
        self._limit = math.inf

    def submit(self) -> None:
        """Queue the jobs; raises what `Service.submit` does."""
        self._submit([result.job for result in self.results])

    def cancel(self) -> None:
        """Free what the jobs use."""
        for result in self.results:
            result.job.is_cancelled = True

    @property
    def is_complete(self) -> bool:
        """True once all choices have ended."""
        return not self._num_left

    async def updates(self) -> AsyncIterator[list[Update]]:
        """Yield what the events add, as lists; `RequestError` if the engine fails or stops."""
        while self._num_left:
            if not self._queue.empty():
                await asyncio.sleep(0)  # neither a full queue nor a free socket lets others run
            events = [await self._queue.get()]
            while not self._queue.empty() and len(events) < MAX_EVENTS:
                events.append(self._queue.get_nowait())
            updates: list[Update] = []
            failure = None
            for job, event in events:
                try:
                    updates += await self._read(job, event)
                except RequestError as error:  # after what came before it
                    failure = error
                    break
            if updates:
                yield updates
            if failure is not None:
                raise failure

    async def prefilled(self) -> Prefilled:
        """Wait for the end of a single job that only prefills; raises what `updates` does."""
        _, event = await self._queue.get()
        if isinstance(event, Failed):
            raise RequestError(event.message, status=503, code="server_error")
        assert isinstance(event, Prefilled)
        return event

    async def _read(self, job: Job, event: Event) -> list[Update]:
        number = self._of_job[job]
        result = self.results[number]
        is_complete = all(choice.finish_reason is not None for choice in result.choices)
        if not self._num_left or (is_complete and job.max_tokens):
            return []  # a failure after the end
        if isinstance(event, Failed):
            raise RequestError(event.message, status=503, code="server_error")
        if isinstance(event, Prefilled):
            result.cached_tokens = event.cached_tokens
            self._metrics.prompt_tokens.inc(len(job.tokens))
            self._metrics.cached_tokens.inc(event.cached_tokens)
            if result.prompt_entries is not None and event.logprobs is not None:
                make = self._prompt_entries
                result.prompt_entries += await in_thread_if_long(
                    len(job.tokens), make, result, event
                )
            if job.max_tokens:
                return []
            self._num_left -= 1
            first = number * job.num_choices
            return [Update(first + i, Piece("", [], "length")) for i in range(job.num_choices)]
        choice = result.choices[event.choice]
        if choice.finish_reason is not None:
            return []
        piece = choice.feed(event)
        result.latencies[event.choice].observe(len(event.tokens))
        if piece.finish_reason is not None:
            job.cancelled_choices.add(event.choice)
            self._num_left -= all(c.finish_reason is not None for c in result.choices)
        return [Update(number * job.num_choices + event.choice, piece)]
