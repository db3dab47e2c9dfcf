"""The model as the HTTP side sees it: checked requests become jobs, and their events answers."""

import asyncio
import collections
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import numpy as np

from simplernn_jax.data.chat_template import ChatTemplate, TemplateError
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.inference.sampling import Sampling
from simplernn_jax.inference.state import RECENT_TOKENS
from simplernn_jax.inference.text import TextStream
from simplernn_jax.models import LanguageModel
from simplernn_jax.serving.jobs import Event, Failed, Job, Prefilled, Prefix, event_bytes
from simplernn_jax.serving.metrics import Metrics
from simplernn_jax.serving.requests import (
    ChatRequest,
    CompletionRequest,
    Inputs,
    RequestError,
    SamplingFields,
    StateRequest,
)
from simplernn_jax.serving.responses import ChoiceText, Piece, TokenEntry, TokenNames, token_entry
from simplernn_jax.serving.states import NamedState, StateFolder
from simplernn_jax.serving.worker import QueueFullError, Worker, WorkerStoppedError

Reload = tuple[LanguageModel, Callable[[], None]]
CHAT_TOKENS = 1024
"""New tokens of a chat completion that asks for no number."""
MAX_ECHOED = 1 << 26
"""Maximum number of characters of prompts in an answer."""
MAX_LOGPROBS = 1 << 22
"""Maximum number of log-probabilities in an answer that is not streamed: some 0.5 GB."""
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


class Service:
    """The model as the HTTP side sees it; methods raise `RequestError` for what they cannot use.

    `load_model` returns the parameters of the selected checkpoint, and a function to call once they
    are used; or None if they are in use.
    """

    def __init__(
        self,
        worker: Worker,
        tokenizer: Tokenizer,
        vocab_size: int,
        model_name: str,
        states: StateFolder,
        template: ChatTemplate | None,
        load_model: Callable[[], Reload | None],
    ) -> None:
        self.worker = worker
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.states = states
        self.metrics = Metrics(worker)
        self.created = int(time.time())
        self.template = template
        self.status = "starting"
        self._load_model = load_model
        self._reloading = asyncio.Lock()
        self._rendering = asyncio.Lock()
        self.names = TokenNames(tokenizer, vocab_size)
        self.inputs = Inputs(tokenizer, vocab_size)

    def check_model(self, name: str | None) -> None:
        """Raise `RequestError` (404) if a request names another model."""
        if name not in (None, self.model_name):
            raise RequestError(
                f"model: {name!r} is not served here; {self.model_name!r} is",
                param="model",
                status=404,
                code="model_not_found",
            )

    async def reload(self) -> bool:
        """Use the checkpoint that is selected now; return False if it is in use.

        Raises `RequestError` (409) if it cannot be loaded; the parameters in use stay.
        """
        async with self._reloading:
            try:
                loaded = await asyncio.to_thread(self._load_model)
                if loaded is None:
                    return False
                model, note_use = loaded
                scheduler = await asyncio.to_thread(self.worker.make_scheduler, model)
            except (UserError, OSError) as error:
                raise RequestError(str(error), status=409, code="reload_failed") from error
            states = await asyncio.to_thread(self.states.with_model, model)
            # Together: no request sees the parameters of one and the states of another.
            self.worker.use_scheduler(scheduler)
            self.states = states
            note_use()
        return True

    def check_room(self) -> None:
        """Raise `RequestError`: 429 if the queue is full, 503 unless the server runs."""
        if self.status != "ready":
            raise RequestError(f"the server is {self.status}", status=503, code=self.status)
        if self.worker.room < 1:
            raise self._queue_full()

    def _queue_full(self) -> RequestError:
        count = self.worker.num_waiting
        waiting = "1 prompt waits" if count == 1 else f"{count} prompts wait"
        message = f"{waiting} already; try again later"
        return RequestError(message, status=429, code="queue_full")

    def submit(self, jobs: list[Job]) -> None:
        """Queue the jobs of a request; raises what `check_room` does."""
        self.check_room()
        most = self.worker.max_waiting + self.worker.num_slots
        if len(jobs) > most:
            raise RequestError(f"prompt: {len(jobs)} prompts; the limit is {most}", param="prompt")
        try:
            self.worker.submit(*jobs)
        except QueueFullError as error:
            raise self._queue_full() from error
        except WorkerStoppedError as error:
            raise RequestError("the server is stopping", status=503, code="stopping") from error

    async def make_answer(
        self, make: Callable[[Any, Any], "Answer"], request: Any, state: str | None, size: int
    ) -> tuple["Answer", NamedState | None]:
        """Call `complete`, `chat` or `prefill_state` for a request that continues a named state.

        Args:
          make: one of these methods.
          request: its first argument.
          state: a name for `StateFolder.load`; None begins anew.
          size: bytes of the request.

        Returns:
          The answer, and the state that it continues.

        Raises:
          RequestError: as `make` and `StateFolder.load`; 409 if parameters are replaced meanwhile.
        """
        states = self.states
        start = None if state is None else await asyncio.to_thread(states.load, state)
        prefix = None if start is None else start.prefix
        if make == self.chat:
            async with self._rendering:  # one process renders: others would wait for it in threads
                answer = await asyncio.to_thread(make, request, prefix)
        else:
            answer = await in_thread_if_long(size, make, request, prefix)
        if start is not None and states is not self.states:
            raise RequestError(f"state {state!r}: of older parameters", status=409)
        return answer, start

    def complete(self, request: CompletionRequest, prefix: Prefix | None) -> "Answer":
        """Make the jobs of a completion, which continues `prefix`."""
        num_choices = request.n or 1
        if request.best_of not in (None, num_choices):
            raise RequestError("best_of: only the value of n is supported", param="best_of")
        if request.suffix:
            raise RequestError('suffix: only "" is supported', param="suffix")
        sampling, stops = self.inputs.sampling(request), _stops(request)
        max_tokens = 16 if request.max_tokens is None else request.max_tokens
        prompts = self.inputs.prompts(request)
        if num_choices * sum(len(echoed) for echoed, _ in prompts) > MAX_ECHOED:
            raise RequestError(
                f"echo: over {MAX_ECHOED:,} characters in one answer; lower n", param="echo"
            )
        if request.logprobs is not None:
            tokens_each = sum(len(tokens) for _, tokens in prompts) if request.echo else 0
            tokens_each += 0 if request.stream else max_tokens * len(prompts)
            _check_logprobs(num_choices * tokens_each, request.logprobs)
        results = []
        streams: collections.Counter[bytes] = collections.Counter()
        for echoed, tokens in prompts:
            # A prompt that is given twice gets other samples.
            key = tokens.tobytes()
            job = Job(
                tokens,
                sampling,
                max_tokens=max_tokens,
                num_choices=num_choices,
                first_stream=streams[key],
                prefix=prefix,
                num_logprobs=0 if request.logprobs is None else max(1, request.logprobs),
                scores_prompt=bool(request.echo) and request.logprobs is not None,
                is_streamed=bool(request.stream),
            )
            streams[key] += num_choices
            results.append(self._result(job, echoed, stops, request.logprobs))
        return Answer(self, results)

    def chat(self, request: ChatRequest, prefix: Prefix | None) -> "Answer":
        """Make the job of a chat completion, which continues `prefix`."""
        if self.template is None:
            raise RequestError("this model has no chat template; use /v1/completions")
        if request.max_tokens is not None and request.max_completion_tokens is not None:
            raise RequestError(
                "max_tokens: leave it out with max_completion_tokens", param="max_tokens"
            )
        if request.top_logprobs is not None and not request.logprobs:
            raise RequestError("top_logprobs: only with logprobs", param="top_logprobs")
        messages = [{"role": m.template_role, "content": m.text} for m in request.messages]
        try:
            if prefix is None:
                text = self.template.render(messages, add_generation_prompt=True)
            else:
                text = self.template.render_next(messages)
        except TemplateError as error:
            raise RequestError(f"messages: {error}", param="messages") from error
        max_tokens = request.max_completion_tokens or request.max_tokens or CHAT_TOKENS
        num_logprobs = (request.top_logprobs or 0) if request.logprobs else None
        if num_logprobs is not None and not request.stream:
            _check_logprobs((request.n or 1) * max_tokens, num_logprobs)
        job = Job(
            self.inputs.prompt(text, prefix is not None),
            self.inputs.sampling(request),
            max_tokens=max_tokens,
            num_choices=request.n or 1,
            prefix=prefix,
            num_logprobs=0 if num_logprobs is None else max(1, num_logprobs),
            is_streamed=bool(request.stream),
        )
        stops = [*_stops(request), self.template.stop]
        return Answer(self, [self._result(job, "", stops, num_logprobs)])

    def prefill_state(self, request: StateRequest, prefix: Prefix | None) -> "Answer":
        """Make the job of a prompt's state for a `StateRequest`; raises `RequestError`."""
        tokens = self.inputs.prompt(request.prompt, prefix is not None)
        job = Job(tokens, Sampling(), prefix=prefix, keeps_state=True)
        return Answer(self, [PromptResult(job, "", None, [])])

    def _result(
        self, job: Job, echoed: str, stops: list[str], num_logprobs: int | None
    ) -> "PromptResult":
        """Make the empty result of a job."""
        before = np.zeros(0, np.int32) if job.prefix is None else job.prefix.recent
        context = np.concatenate([before, job.tokens[-RECENT_TOKENS:]])[-RECENT_TOKENS:]
        options = context, stops, job.sampling.stop_ids, num_logprobs, len(echoed)
        choices = [ChoiceText(self.tokenizer, *options) for _ in range(job.num_choices)]
        return PromptResult(job, echoed, [] if job.scores_prompt else None, choices)

    def describe_state(self, state: NamedState) -> Any:
        """Describe a state as the API does."""
        return {
            "id": state.name,
            "object": "state",
            "tokens": state.length,
            "bytes": state.num_bytes,
            "sha256": state.fingerprint,
            "parent": state.parent,
            "text": self.tokenizer.decode(state.recent),
        }

    def prompt_entries(self, result: "PromptResult", event: Prefilled) -> list[TokenEntry]:
        """Make the entries of a prompt's tokens."""
        job, logprobs = result.job, event.logprobs
        num_top = result.choices[0].num_logprobs or 0
        assert logprobs is not None
        stream = TextStream(self.tokenizer)
        shift = len(job.tokens) - len(logprobs.token)  # 1 without a state: nothing predicts it
        entries, offset = [], 0
        for index, token in enumerate(job.tokens.tolist()):
            row = None if index < shift else logprobs
            entries.append(token_entry(token, offset, row, index - shift, num_top))
            offset += len(stream.feed([token]))
        return entries


def _stops(request: SamplingFields) -> list[str]:
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options: only with stream", param="stream_options")
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return [stop for stop in stops if stop]


def _check_logprobs(tokens: int, top_logprobs: int) -> None:
    if tokens * (1 + top_logprobs) > MAX_LOGPROBS:
        raise RequestError(
            f"logprobs: over {MAX_LOGPROBS:,} of them in one answer; lower max_tokens, n or "
            "logprobs, or stream",
            param="logprobs",
        )


@dataclasses.dataclass(eq=False)
class PromptResult:
    """Continuations of one prompt, as they grow."""

    job: Job
    prompt_text: str
    prompt_entries: list[TokenEntry] | None
    choices: list[ChoiceText]
    cached_tokens: int = 0

    @property
    def is_complete(self) -> bool:
        """True once all choices have ended."""
        return all(choice.finish_reason is not None for choice in self.choices)


Update = tuple[int, Piece]
"""Index of a choice among those of all prompts, and its addition."""


class Answer:
    """A submitted request: iterate over `updates` until all its choices have ended."""

    def __init__(self, service: Service, results: list[PromptResult]) -> None:
        self.results = results
        self._service = service
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
        self._service.submit([result.job for result in self.results])

    def cancel(self) -> None:
        """Free what the jobs use."""
        for result in self.results:
            result.job.is_cancelled = True

    @property
    def is_complete(self) -> bool:
        """True once all choices have ended."""
        return not self._num_left

    @property
    def usage(self) -> Any:
        """Number of tokens, as the API reports it."""
        prompt = sum(len(result.job.tokens) for result in self.results)
        new = sum(choice.num_tokens for result in self.results for choice in result.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(r.cached_tokens for r in self.results)},
        }

    async def updates(self) -> AsyncIterator[list[Update]]:
        """Yield what the events add, as lists; `RequestError` if the worker fails or stops.

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

    async def pieces(self) -> list[Piece]:
        """Collect the whole pieces of all choices; raises what `updates` does."""
        results = [result for result in self.results for _ in result.choices]
        pieces = [Piece(result.prompt_text, [], None) for result in results]
        async for updates in self.updates():
            for index, piece in updates:
                pieces[index].text += piece.text
                pieces[index].entries += piece.entries
                pieces[index].finish_reason = piece.finish_reason
        for result, piece in zip(results, pieces, strict=True):
            piece.entries[:0] = result.prompt_entries or []
        return pieces

    async def prefilled(self) -> Prefilled:
        """Wait for the end of a single job that only prefills; raises what `updates` does."""
        _, event = await self._queue.get()
        if isinstance(event, Failed):
            raise RequestError(event.message, status=503, code="server_error")
        assert isinstance(event, Prefilled)
        return event

    async def _read(self, job: Job, event: Event) -> list[Update]:
        number = self._of_job[job]
        result, first = self.results[number], number * job.num_choices
        if not self._num_left or (result.is_complete and job.max_tokens):
            return []  # a failure after the end
        if isinstance(event, Failed):
            raise RequestError(event.message, status=503, code="server_error")
        metrics = self._service.metrics
        if isinstance(event, Prefilled):
            result.cached_tokens = event.cached_tokens
            metrics.prompt_tokens.inc(len(job.tokens))
            metrics.cached_tokens.inc(event.cached_tokens)
            if result.prompt_entries is not None and event.logprobs is not None:
                make = self._service.prompt_entries
                result.prompt_entries += await in_thread_if_long(
                    len(job.tokens), make, result, event
                )
            if job.max_tokens:
                return []
            self._num_left -= 1
            return [(first + i, Piece("", [], "length")) for i in range(job.num_choices)]
        choice = result.choices[event.choice]
        if choice.finish_reason is not None:
            return []
        metrics.observe(choice, len(event.tokens))
        piece = choice.feed(event)
        if piece.finish_reason is not None:
            job.cancelled_choices.add(event.choice)
            self._num_left -= result.is_complete
        return [(first + event.choice, piece)]
