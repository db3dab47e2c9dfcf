"""The model as the HTTP side sees it: requests become jobs of the worker."""

import asyncio
import contextlib
import functools
import math
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection

import numpy as np
from starlette.responses import Response

from simplernn_jax.data.chat_template import ChatTemplate, TemplateError
from simplernn_jax.data.infilling import Infilling, InfillPrompt
from simplernn_jax.data.tokenizer import Tokenizer, ids_without_text, token_bytes
from simplernn_jax.errors import UserError
from simplernn_jax.inference.sampling import Sampling
from simplernn_jax.models import LanguageModel
from simplernn_jax.serving.answers import Answer, TokenNames
from simplernn_jax.serving.http import json_response
from simplernn_jax.serving.jobs import Job, Prefix
from simplernn_jax.serving.requests import (
    AnyRequest,
    Around,
    ChatRequest,
    DetokenizeRequest,
    InfillRequest,
    JobRequest,
    Prompt,
    RequestError,
    SamplingFields,
    StateRequest,
    TokenizeRequest,
    parse,
)
from simplernn_jax.serving.scheduler import Scheduler
from simplernn_jax.serving.states import StateFolder
from simplernn_jax.serving.worker import Worker

MAX_ECHOED = 1 << 26
"""Maximum number of characters of prompts in an answer."""
MAX_LOGPROBS = 1 << 22
"""Maximum number of log-probabilities in an answer that is not streamed: some 0.5 GB."""
_SAMPLING = ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
"""Fields that `Sampling` has too, with the same defaults."""


class Service:
    """The model as the HTTP side sees it; methods raise `RequestError` for what they cannot use.

    `checkpoint` is the path of the parameters in use. `load_other` loads those that are selected
    now, with their path; it returns None if they are in use. By default they never change.
    """

    def __init__(
        self,
        worker: Worker,
        tokenizer: Tokenizer,
        vocab_size: int,
        model_name: str,
        states: StateFolder,
        template: ChatTemplate | None = None,
        checkpoint: str = "",
        load_other: Callable[[str], tuple[str, LanguageModel] | None] = lambda checkpoint: None,
    ) -> None:
        self.worker = worker
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.states = states
        self.created = int(time.time())
        self.template = template
        self.status = "starting"
        bytes_of = token_bytes(tokenizer, vocab_size)
        self.names = TokenNames(bytes_of)
        self._vocab_size = vocab_size
        self._banned_ids = ids_without_text(tokenizer, vocab_size)
        self._infilling = Infilling(tokenizer, bytes_of)

        @functools.lru_cache(maxsize=64)
        def ids_with(text: str) -> frozenset[int]:
            return frozenset(i for i, part in enumerate(bytes_of) if text.encode() in part)

        self._ids_with = ids_with
        self._checkpoint, self._load_other = checkpoint, load_other
        self._reloading = asyncio.Lock()
        self._rendering = asyncio.Lock()

    def check_model(self, name: str | None) -> None:
        """Raise `RequestError` (404) if a request names another model."""
        if name not in (None, self.model_name):
            raise RequestError(
                f"model: {name!r} is not served here; {self.model_name!r} is", status=404
            )

    def check_room(self) -> None:
        """Raise `RequestError`: 429 if the queue is full, 503 unless the server runs."""
        if self.status != "ready":
            raise RequestError(f"the server is {self.status}", status=503)
        self.worker.check_room()

    async def reload(self) -> bool:
        """Use the checkpoint that is selected now; return False if it is in use.

        Raises `RequestError` (409) if it cannot be loaded; the parameters in use stay.
        """

        def load() -> tuple[str, Scheduler, StateFolder] | None:
            loaded = self._load_other(self._checkpoint)
            if loaded is None:
                return None
            checkpoint, model = loaded
            return checkpoint, self.worker.make_scheduler(model), self.states.with_model(model)

        async with self._reloading:
            try:
                loaded = await asyncio.to_thread(load)
            except (UserError, OSError) as error:
                raise RequestError(str(error), status=409) from error
            if loaded is not None:
                # Together: no request sees the parameters of one and the states of another.
                self._checkpoint, scheduler, self.states = loaded
                self.worker.use_scheduler(scheduler)
        return loaded is not None

    async def answer(self, kind: type[AnyRequest], content: bytes) -> tuple[AnyRequest, Answer]:
        """Parse the body of a request, and make its answer, whose jobs are not submitted yet.

        Raises:
          RequestError: 400 for values that the model cannot use, 409 if the parameters are replaced
            meanwhile, or as `StateFolder.load`.
        """
        states = self.states

        def make() -> tuple[AnyRequest, Answer]:
            request = parse(kind, content)
            if isinstance(request, StateRequest):
                name = request.parent
            else:
                self.check_model(request.model)
                name = request.state
            prefix = None if name is None else states.load(name)
            return request, Answer(self.worker, self.tokenizer, self.jobs(request, prefix))

        # One process renders conversations: others would wait for it in threads.
        async with self._rendering if kind is ChatRequest else contextlib.nullcontext():
            made = await asyncio.to_thread(make)
        if states is not self.states and any(job.prefix is not None for job in made[1].jobs):
            raise RequestError("state: of older parameters", status=409)
        return made

    def jobs(self, request: JobRequest, prefix: Prefix | None) -> list[Job]:
        """Make one job for each prompt of a request, which continues `prefix`."""
        has_state = prefix is not None
        if isinstance(request, StateRequest):
            tokens = self.prompt_ids(request.prompt, has_state)
            return [Job(tokens, Sampling(), prefix=prefix, keeps_state=True)]
        sampling, stops = self.sampling(request), request.stops
        if isinstance(request, ChatRequest):
            text, end = self._render(request, has_state)
            prompts, stops = [text], [*stops, end]
        else:
            prompts = request.prompts
        made = [self._prompt(prompt, has_state, sampling) for prompt in prompts]
        texts = [""] * len(made)
        if request.echo:
            texts = [p if isinstance(p, str) else self.tokenizer.decode(p) for p in prompts]
        num_choices, max_tokens, num_logprobs = request.n or 1, request.length, request.num_logprobs
        if num_choices * sum(map(len, texts)) > MAX_ECHOED:
            message = f"echo: over {MAX_ECHOED:,} characters in one answer; lower n"
            raise RequestError(message)
        reported = 0 if request.stream else max_tokens * len(made)
        reported += sum(len(tokens) for tokens, _ in made) if request.echo else 0
        if num_logprobs is not None and num_choices * reported * (1 + num_logprobs) > MAX_LOGPROBS:
            raise RequestError(
                f"logprobs: over {MAX_LOGPROBS:,} of them in one answer; lower max_tokens, n or "
                "logprobs, or stream"
            )
        prompt_seconds, max_seconds = None, math.inf
        if isinstance(request, InfillRequest) and max_tokens:  # else it only fills the cache
            if request.t_max_prompt_ms > 0:
                prompt_seconds = request.t_max_prompt_ms / 1e3
            if request.t_max_predict_ms > 0:
                max_seconds = request.t_max_predict_ms / 1e3
        jobs = []
        streams: Counter[bytes] = Counter()
        ending_ids = frozenset[int]().union(*map(self._ids_with, stops))
        for text, (tokens, infill) in zip(texts, made, strict=True):
            # The first token may have a stop string in what was typed of it.
            healed = [] if infill is None else np.concatenate([*infill.first_ids, []]).tolist()
            jobs.append(
                Job(
                    tokens,
                    sampling,
                    max_tokens=max_tokens,
                    num_choices=num_choices,
                    first_stream=streams[tokens.tobytes()],
                    prefix=prefix,
                    num_logprobs=num_logprobs,
                    scores_prompt=bool(request.echo) and num_logprobs is not None,
                    echoed=text,
                    stops=stops,
                    ends_at_repeats=isinstance(request, InfillRequest) and not request.temperature,
                    ending_ids=ending_ids.difference(healed),
                    infill=infill,
                    cached_at=infill and infill.stable,
                    is_streamed=bool(request.stream or infill),  # somebody is typing
                    prompt_seconds=prompt_seconds,
                    max_seconds=max_seconds,
                )
            )
            streams[tokens.tobytes()] += num_choices  # a prompt given twice gets other samples
        return jobs

    def _prompt(
        self, prompt: Prompt | Around, has_state: bool, sampling: Sampling
    ) -> tuple[np.ndarray, InfillPrompt | None]:
        """Make the ids of a prompt, and for infilling what else was made with them."""
        if not isinstance(prompt, Around):
            return self.prompt_ids(prompt, has_state), None
        try:
            made = self._infilling.prompt(*prompt, sampling.banned_ids, with_bos=not has_state)
        except UserError as error:
            raise RequestError(f"prompt: {error}") from error
        return made.tokens, made

    def _render(self, request: ChatRequest, has_state: bool) -> tuple[str, str]:
        """Return the text of a conversation, and the string that ends its answer."""
        if self.template is None:
            raise RequestError("this model has no chat template; use /v1/completions")
        messages = [message.for_template() for message in request.messages]
        try:
            if has_state:
                text = self.template.render_next(messages)
            else:
                text = self.template.render(messages, add_generation_prompt=True)
        except TemplateError as error:
            raise RequestError(f"messages: {error}") from error
        return text, self.template.stop

    def encode(self, text: str) -> np.ndarray:
        """Encode `text`, without BOS."""
        try:
            return self.tokenizer.encode(text)
        except UserError as error:
            raise RequestError(f"prompt: {error}") from error

    def tokenize(self, content: bytes) -> Response:
        """Answer ``POST /tokenize``."""
        body = parse(TokenizeRequest, content)
        self.check_model(body.model)
        bos = [self.tokenizer.bos_id] if body.add_special_tokens else []
        ids = [*bos, *self.encode(body.prompt).tolist()]
        names = [self.names.names[i] for i in ids] if body.return_token_strs else None
        return json_response({"count": len(ids), "tokens": ids, "token_strs": names})

    def detokenize(self, content: bytes) -> Response:
        """Answer ``POST /detokenize``."""
        body = parse(DetokenizeRequest, content)
        self.check_model(body.model)
        self.check_ids("tokens", body.tokens)
        return json_response({"prompt": self.tokenizer.decode(body.tokens)})

    def prompt_ids(self, prompt: Prompt, has_state: bool) -> np.ndarray:
        """Return the ids of a prompt; a text begins with BOS unless it continues a state."""
        if isinstance(prompt, str):
            bos = [] if has_state else [self.tokenizer.bos_id]
            return np.concatenate([bos, self.encode(prompt)]).astype(np.int32)
        self.check_ids("prompt", prompt)
        if not prompt and not has_state:
            raise RequestError("prompt: a list of token ids is empty")
        return np.array(prompt, np.int32)

    def check_ids(self, param: str, ids: Collection[int]) -> None:
        """Check that all ids are in the vocabulary."""
        largest = max(ids, default=0)
        if largest >= self._vocab_size:
            message = f"{param}: token {largest} is outside the vocabulary of {self._vocab_size}"
            raise RequestError(message)

    def sampling(self, request: SamplingFields) -> Sampling:
        """Convert the settings of a request."""
        stop_ids, banned = request.stop_token_ids or [], request.banned_token_ids or []
        self.check_ids("stop_token_ids", stop_ids)
        self.check_ids("banned_token_ids", banned)
        self.check_ids("logit_bias", request.logit_bias or [])
        banned_ids = self._banned_ids.union(banned)
        if len(banned_ids) >= self._vocab_size:
            message = "banned_token_ids: leave at least one token"
            raise RequestError(message)
        if not request.ignore_eos:
            stop_ids = [*stop_ids, self.tokenizer.eos_id]
        given = {name: getattr(request, name) for name in _SAMPLING}
        return Sampling(
            **{name: value for name, value in given.items() if value is not None},
            temperature=1.0 if request.temperature is None else request.temperature,
            top_k=max(0, min(request.top_k or 0, self._vocab_size)),
            logit_bias=request.logit_bias or {},
            banned_ids=tuple(sorted(banned_ids)),
            stop_ids=tuple(sorted({*stop_ids})),
            seed=secrets.randbits(32) if request.seed is None else request.seed % 2**32,
        )
