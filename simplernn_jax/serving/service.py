"""Convert checked requests to jobs of the engine."""

import asyncio
import collections
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from simplernn_jax.data.chat_template import ChatTemplate, TemplateError
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.inference.state import RECENT_TOKENS
from simplernn_jax.inference.text import TextStream
from simplernn_jax.models import LanguageModel
from simplernn_jax.serving.answers import Answer, PromptResult, in_thread_if_long
from simplernn_jax.serving.choice_text import ChoiceText, TokenEntry, TokenNames, token_entry
from simplernn_jax.serving.engine import Engine, EngineStoppedError, QueueFullError
from simplernn_jax.serving.inputs import Inputs
from simplernn_jax.serving.jobs import Job, Prefilled, Sampling
from simplernn_jax.serving.metrics import Latency, Metrics
from simplernn_jax.serving.requests import (
    ChatRequest,
    CompletionRequest,
    RequestError,
    SamplingFields,
    StateRequest,
)
from simplernn_jax.serving.states import NamedState, StateFolder

Reload = tuple[LanguageModel, Callable[[], None]]
RETRY_AFTER_SECONDS = 1
CHAT_TOKENS = 1024
"""New tokens of a chat completion that asks for no number."""
MAX_ECHOED = 1 << 26
"""Maximum number of characters of prompts in an answer."""
MAX_LOGPROBS = 1 << 22
"""Maximum number of log-probabilities in an answer that is not streamed: some 0.5 GB."""


class Service:
    """The model as the HTTP side sees it; methods raise `RequestError` for what they cannot use.

    `load_model` returns the parameters of the selected checkpoint, and a function to call once they
    are used; or None if they are in use.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        vocab_size: int,
        model_name: str,
        states: StateFolder,
        template: ChatTemplate | None,
        load_model: Callable[[], Reload | None],
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.states = states
        self.metrics = Metrics(engine)
        self.created = int(time.time())
        self.template = template
        self.status = "starting"
        self._load_model = load_model
        self._reloading = asyncio.Lock()
        self._rendering = asyncio.Lock()
        self.names = TokenNames(tokenizer, vocab_size)
        self.inputs = Inputs(tokenizer, vocab_size)

    async def load_state(self, name: str | None) -> NamedState | None:
        """Load a named state, as `StateFolder.load`; 409 if parameters are replaced meanwhile."""
        if name is None:
            return None
        states = self.states
        state = await asyncio.to_thread(states.load, name)
        if states is not self.states:
            raise RequestError(f"state {name!r}: of older parameters", status=409)
        return state

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
                decoder = await asyncio.to_thread(self.engine.make_decoder, model)
            except (UserError, OSError) as error:
                raise RequestError(str(error), status=409, code="reload_failed") from error
            states = await asyncio.to_thread(self.states.with_model, model)
            # Together: no request sees the parameters of one and the states of another.
            self.engine.use_decoder(decoder)
            self.states = states
            note_use()
        return True

    def check_room(self) -> None:
        """Raise `RequestError`: 429 if the queue is full, 503 unless the server runs."""
        if self.status != "ready":
            raise RequestError(f"the server is {self.status}", status=503, code=self.status)
        if self.engine.room < 1:
            raise self._queue_full()

    def _queue_full(self) -> RequestError:
        count = self.engine.num_waiting
        waiting = "1 prompt waits" if count == 1 else f"{count} prompts wait"
        message = f"{waiting} already; try again later"
        return RequestError(message, status=429, code="queue_full")

    def submit(self, jobs: list[Job]) -> None:
        """Queue the jobs of a request; raises what `check_room` does."""
        self.check_room()
        most = self.engine.max_waiting + self.engine.num_slots
        if len(jobs) > most:
            raise RequestError(f"prompt: {len(jobs)} prompts; the limit is {most}", param="prompt")
        try:
            self.engine.submit(*jobs)
        except QueueFullError as error:
            raise self._queue_full() from error
        except EngineStoppedError as error:
            raise RequestError("the server is stopping", status=503, code="stopping") from error

    async def make_answer(
        self, make: Callable[[Any, Any], Answer], request: Any, start: NamedState | None, size: int
    ) -> Answer:
        """Call `complete`, `chat` or `prefill_state` for a request of `size` bytes.

        Raises what it does, and `RequestError` (409) if parameters are replaced meanwhile.
        """
        states = self.states
        if make == self.chat:
            async with self._rendering:  # one process renders: others would wait for it in threads
                answer = await asyncio.to_thread(make, request, start)
        else:
            answer = await in_thread_if_long(size, make, request, start)
        if start is not None and states is not self.states:
            raise RequestError(f"state {start.name!r}: of older parameters", status=409)
        return answer

    def complete(self, request: CompletionRequest, start: NamedState | None) -> Answer:
        """Make the jobs of a completion, which continues the state `start`."""
        num_choices = request.n or 1
        if request.best_of not in (None, num_choices):
            raise RequestError("best_of: only the value of n is supported", param="best_of")
        if request.suffix:
            raise RequestError('suffix: only "" is supported', param="suffix")
        sampling, stops = self.inputs.sampling(request), _stops(request)
        results = []
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
        streams: collections.Counter[bytes] = collections.Counter()
        for echoed, tokens in prompts:
            # A prompt that is given twice gets other samples.
            key = tokens.tobytes()
            first_stream = streams[key]
            streams[key] += num_choices
            job = Job(
                tokens,
                sampling,
                max_tokens=max_tokens,
                num_choices=num_choices,
                first_stream=first_stream,
                root=None if start is None else start.root,
                recent=None if start is None else start.recent,
                num_logprobs=0 if request.logprobs is None else max(1, request.logprobs),
                scores_prompt=bool(request.echo) and request.logprobs is not None,
                is_streamed=bool(request.stream),
            )
            results.append(self.result(job, start, echoed, stops, request.logprobs))
        return self._answer(results)

    def chat(self, request: ChatRequest, start: NamedState | None) -> Answer:
        """Make the job of a chat completion, which continues the state `start`."""
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
            if start is None:
                text = self.template.render(messages, add_generation_prompt=True)
            else:
                text = self.template.render_next(messages)
        except TemplateError as error:
            raise RequestError(f"messages: {error}", param="messages") from error
        tokens = self.inputs.prompt(text, start is not None)
        max_tokens = request.max_completion_tokens or request.max_tokens or CHAT_TOKENS
        if request.logprobs and not request.stream:
            _check_logprobs((request.n or 1) * max_tokens, request.top_logprobs or 0)
        job = Job(
            tokens,
            self.inputs.sampling(request),
            max_tokens=max_tokens,
            num_choices=request.n or 1,
            root=None if start is None else start.root,
            recent=None if start is None else start.recent,
            num_logprobs=max(1, request.top_logprobs or 0) if request.logprobs else 0,
            is_streamed=bool(request.stream),
        )
        stops = [*_stops(request), self.template.stop]
        num_logprobs = (request.top_logprobs or 0) if request.logprobs else None
        return self._answer([self.result(job, start, "", stops, num_logprobs)])

    def _answer(self, results: list[PromptResult]) -> Answer:
        return Answer(results, self.submit, self.prompt_entries, self.metrics)

    def result(
        self,
        job: Job,
        start: NamedState | None,
        echoed: str,
        stops: list[str],
        num_logprobs: int | None,
    ) -> PromptResult:
        """Make the empty result of a job."""
        context = job.tokens if start is None else np.concatenate([start.recent, job.tokens])
        choices = [
            ChoiceText(
                self.tokenizer,
                context[-RECENT_TOKENS:],
                stops,
                job.sampling.stop_ids,
                num_logprobs,
                len(echoed),
            )
            for _ in range(job.num_choices)
        ]
        latencies = [Latency(self.metrics) for _ in choices]
        return PromptResult(job, echoed, [] if job.scores_prompt else None, choices, latencies)

    def prefill_state(self, request: StateRequest, parent: NamedState | None) -> Answer:
        """Make the job of a prompt's state for a `StateRequest`; raises `RequestError`."""
        tokens = self.inputs.prompt(request.prompt, parent is not None)
        root = None if parent is None else parent.root
        job = Job(tokens, Sampling(), root=root, keeps_state=True)
        return self._answer([PromptResult(job, "", None, [], [])])

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

    def prompt_entries(self, result: PromptResult, event: Prefilled) -> list[TokenEntry]:
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
