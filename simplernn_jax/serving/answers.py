"""Answers to requests as they grow: from the engine's events to text."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from simplernn_jax.serving.choice_text import ChoiceText, Piece, TokenEntry
from simplernn_jax.serving.jobs import Event, Failed, Job, Prefilled, event_bytes
from simplernn_jax.serving.metrics import Latency, Metrics
from simplernn_jax.serving.requests import RequestError

MAX_UNREAD_BYTES = 1 << 17
"""Bytes of events of a request beyond which it pauses until its client has read some of them."""
MAX_BATCH_BYTES = 1 << 14
"""Bytes of events from which no more of them are handled together."""
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
        self._unread_bytes = 0
        """Estimated memory of the events that the client has not read."""
        for result in results:
            result.job.deliver = self._deliver

    def _deliver(self, job: Job, event: Event) -> None:
        self._queue.put_nowait((job, event))
        self._unread_bytes += event_bytes(event)
        if self._unread_bytes > MAX_UNREAD_BYTES and job.unread_since is None:
            self._pace()

    def _pace(self) -> None:
        """Let the jobs pause while the client has too much to read."""
        since = time.monotonic() if self._unread_bytes > MAX_UNREAD_BYTES else None
        for result in self.results:
            result.job.unread_since = since

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
        """Yield what the events add, as lists; `RequestError` if the engine fails or stops.

        Events count as read once the next ones are asked for.
        """
        while self._num_left:
            if not self._queue.empty():
                await asyncio.sleep(0)  # neither a full queue nor a free socket lets others run
            events = [await self._queue.get()]
            num_bytes = event_bytes(events[0][1])
            while not self._queue.empty() and num_bytes < MAX_BATCH_BYTES:
                events.append(self._queue.get_nowait())
                num_bytes += event_bytes(events[-1][1])
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
            self._unread_bytes -= num_bytes
            self._pace()

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
