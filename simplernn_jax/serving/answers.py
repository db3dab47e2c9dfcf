"""Answers to requests: text and log-probabilities from the events of their jobs, as JSON.

Bodies of completions and chat completions are those of OpenAI's API, of infills llama.cpp's.
"""

import asyncio
import dataclasses
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

import jax

from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.inference.engine import PrefixState
from simplernn_jax.inference.sampling import IMPOSSIBLE, TokenLogprobs
from simplernn_jax.inference.text import RepeatedLines, StopStrings, TextStream
from simplernn_jax.serving.jobs import Event, Job, NewTokens, Prefilled
from simplernn_jax.serving.requests import (
    ChatRequest,
    CompletionRequest,
    InfillRequest,
    RequestError,
)
from simplernn_jax.serving.worker import Worker

MAX_UNREAD_BYTES = 1 << 17
"""Bytes of events of a request beyond which it pauses until its client has read some of them."""


class TokenEntry(NamedTuple):
    """A token with its log-probability, if requested."""

    token: int
    offset: int
    """Characters before it."""
    logprob: float | None
    """None for the first token of a prompt, which nothing predicts."""
    top: list[tuple[int, float]]


@dataclasses.dataclass
class Piece:
    """Addition to a continuation."""

    text: str
    entries: list[TokenEntry]
    finish_reason: str | None


Update = tuple[int, Piece]
"""Index of a choice among the choices of all prompts, and its addition."""


def token_entry(
    token: int, offset: int, logprobs: TokenLogprobs | None, index: int, num_top: int
) -> TokenEntry:
    """Make the entry of a token from row `index` of `logprobs`; None without a prediction."""
    if logprobs is None:
        return TokenEntry(token, offset, None, [])
    ids = logprobs.top_ids[index, :num_top].tolist()
    values = logprobs.top[index, :num_top].tolist()
    top = [(i, value) for i, value in zip(ids, values, strict=True) if value > IMPOSSIBLE / 2]
    return TokenEntry(token, offset, float(logprobs.token[index]), top)


class ChoiceText:
    """Incremental text of one continuation of a job.

    A character is never cut, and text that may be the beginning of a stop string is held back.
    """

    def __init__(self, tokenizer: Tokenizer, job: Job) -> None:
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self.last_seconds = time.perf_counter()
        """Time of the last event, or of its creation."""
        self._num_logprobs = job.num_logprobs
        self._stream = TextStream(tokenizer, job.text)
        self._num_typed = job.infill.num_typed[0] if job.infill and job.infill.typed else 0
        """Characters to leave out, which the prompt has."""
        self._stops = StopStrings(job.stops)
        self._repeats = RepeatedLines() if job.ends_at_repeats else None
        self._is_simple = job.num_logprobs is None and not job.stops and not self._repeats
        self._stop_ids = frozenset(job.sampling.stop_ids)
        self._offset = len(job.echoed)
        """Characters returned."""
        self._entries: list[TokenEntry] = []

    def feed(self, new: NewTokens, is_last: bool = False) -> Piece:
        """Take new tokens and return what they complete; no more are wanted if `is_last`."""
        tokens, text = new.tokens.tolist(), ""
        reason = new.finish_reason or ("length" if is_last else None)
        parts = [tokens] if self._is_simple else [[token] for token in tokens]
        for index, several in enumerate(parts):
            self.num_tokens += len(several)
            if self._num_logprobs is not None:
                start = self._offset + len(text) + len(self._stops.held_back)
                entry = token_entry(several[0], start, new.logprobs, index, self._num_logprobs)
                self._entries.append(entry)
            decoded = self._stream.feed([t for t in several if t not in self._stop_ids])
            num_typed = min(self._num_typed, len(decoded))
            self._num_typed -= num_typed
            text += self._lines(self._stops.feed(decoded[num_typed:]))
            if self._stops.has_ended or (self._repeats and self._repeats.has_ended):
                return self._take(text + self._last_line(), "stop")
        if reason is not None:
            text += self._lines(self._stops.finish(self._stream.finish())) + self._last_line()
        return self._take(text, reason)

    def _lines(self, text: str) -> str:
        return text if self._repeats is None else self._repeats.feed(text)

    def _last_line(self) -> str:
        return "" if self._repeats is None else self._repeats.finish()

    @property
    def stopping_word(self) -> str:
        """The stop string that has ended the text; empty if none has."""
        return next(filter(self._stops.held_back.startswith, self._stops.stops), "")

    def _take(self, text: str, reason: str | None) -> Piece:
        """Return `text`, and the tokens that begin in it."""
        self._offset += len(text)
        self.finish_reason = reason
        ready = [entry for entry in self._entries if entry.offset < self._offset]
        if reason is not None and not self._stops.has_ended:
            ready = self._entries  # tokens without text, such as EOS, belong to it
        self._entries = self._entries[len(ready) :]
        return Piece(text, ready, reason)


def prompt_entries(tokenizer: Tokenizer, job: Job, logprobs: TokenLogprobs) -> list[TokenEntry]:
    """Make the entries of a prompt."""
    shift = len(job.tokens) - len(logprobs.token)  # 1 without a state: nothing predicts it
    entries, offset, stream = [], 0, TextStream(tokenizer)
    for index, token in enumerate(job.tokens.tolist()):
        row = None if index < shift else logprobs
        entries.append(token_entry(token, offset, row, index - shift, job.num_logprobs or 0))
        offset += len(stream.feed([token]))
    return entries


def event_bytes(event: Event) -> int:
    """Estimate the memory that an event takes."""
    return 512 + sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(event))


class Answer:
    """The results of the jobs of a request: `submit` them, then iterate over `updates`.

    The jobs have the same number of choices each.
    """

    def __init__(self, worker: Worker, tokenizer: Tokenizer, jobs: list[Job]) -> None:
        self.jobs = jobs
        self.state: PrefixState | None = None
        """State after the prompt of a job that keeps it."""
        self._worker, self._tokenizer = worker, tokenizer
        self._queue: asyncio.Queue[tuple[Job, Event]] = asyncio.Queue()
        self.choices = [ChoiceText(tokenizer, job) for job in jobs for _ in range(job.num_choices)]
        self.cached_tokens = 0
        self.left_out = 0
        """Tokens that were left out of prompts, for lack of time."""
        self.began = self.prefilled = self.ended = time.perf_counter()
        """Times of the submission, the end of prefill, and the last update."""
        self._unread_bytes = 0
        for job in jobs:
            job.deliver = self._deliver

    def _deliver(self, job: Job, event: Event) -> None:
        self._queue.put_nowait((job, event))
        self._count_unread(event_bytes(event))

    def _count_unread(self, num_bytes: int) -> None:
        """Let the jobs pause while the client has too much to read."""
        self._unread_bytes += num_bytes
        for job in self.jobs:
            job.is_paused = self._unread_bytes > MAX_UNREAD_BYTES

    def submit(self) -> None:
        """Queue the jobs; raises what `Worker.submit` does."""
        self._worker.submit(*self.jobs)

    def cancel(self) -> None:
        """Free what the jobs use."""
        self._worker.cancel(*self.jobs)

    @property
    def usage(self) -> Any:
        """Number of tokens, as the API reports it."""
        prompt = sum(len(job.tokens) for job in self.jobs)
        new = sum(choice.num_tokens for choice in self.choices)
        cached = self.cached_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached, "replayed_tokens": prompt - cached},
        }

    @property
    def _is_complete(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)

    async def updates(self) -> AsyncIterator[list[Update]]:
        """Yield what the events add, as lists; `RequestError` if the worker fails or stops.

        Events count as read once the next ones are asked for.
        """
        while not self._is_complete:
            if not self._queue.empty():
                await asyncio.sleep(0)  # neither a full queue nor a free socket lets others run
            events = [await self._queue.get()]
            while not self._queue.empty():
                events.append(self._queue.get_nowait())
            updates: list[Update] = []
            for job, event in events:
                if isinstance(event, RequestError):
                    break
                updates += await self._read(job, event)
            if updates:
                yield updates
            if isinstance(event, RequestError) and not self._is_complete:
                raise event  # after what came before it
            self._count_unread(-sum(event_bytes(event) for _, event in events))

    async def pieces(self) -> list[Piece]:
        """Collect the whole pieces of all choices, and end; raises what `updates` does."""
        pieces = [Piece("", [], None) for _ in self.choices]
        try:
            async for updates in self.updates():
                for index, piece in updates:
                    pieces[index].text += piece.text
                    pieces[index].entries += piece.entries
                    pieces[index].finish_reason = piece.finish_reason
        finally:
            self.cancel()
        return pieces

    async def _read(self, job: Job, event: Prefilled | NewTokens) -> list[Update]:
        metrics, first = self._worker.metrics, self.jobs.index(job) * job.num_choices
        if isinstance(event, Prefilled):
            self.state = event.state
            self.cached_tokens += event.cached_tokens
            self.left_out += event.left_out
            self.prefilled, self.ended = event.seconds, time.perf_counter()
            metrics.prompt_tokens.inc(len(job.tokens))
            metrics.cached_tokens.inc(event.cached_tokens)
            entries = []
            if event.logprobs is not None:
                entries = await asyncio.to_thread(
                    prompt_entries, self._tokenizer, job, event.logprobs
                )
            piece = Piece(job.echoed, entries, None if job.max_tokens else "length")
            if piece == Piece("", [], None):
                return []
            indices = range(first, first + job.num_choices)
            for index in indices:
                self.choices[index].finish_reason = piece.finish_reason
            return [(index, piece) for index in indices]
        choice = self.choices[first + event.choice]
        if choice.finish_reason is not None:
            return []
        self.ended = now = time.perf_counter()
        metrics.observe(choice.num_tokens, len(event.tokens), now - choice.last_seconds)
        choice.last_seconds = now
        piece = choice.feed(event, now > self.prefilled + job.max_seconds)
        if piece.finish_reason is not None:
            job.cancelled_choices.add(event.choice)
        return [(first + event.choice, piece)]


class TokenNames:
    """Names and bytes of the ids of a tokenizer, by its `token_bytes`.

    A token's name is its text; bytes that are part of a character are ``bytes:\\xNN``, as in
    OpenAI's API. Tokens without a text, or with one that another token has, are ``token_id:N``.
    """

    def __init__(self, bytes_of: Sequence[bytes]) -> None:
        self.bytes_of = bytes_of
        names = [_name(content) for content in bytes_of]
        uses = Counter(names)
        self.names = [
            name
            if name and uses[name] == 1 and not name.startswith("token_id:")
            else f"token_id:{i}"
            for i, name in enumerate(names)
        ]


def _name(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class Completion:
    """Bodies of one text completion."""

    id_prefix = "cmpl-"
    whole = "text_completion"
    chunk = "text_completion"

    def __init__(
        self, request: CompletionRequest | ChatRequest, model_name: str, names: TokenNames
    ) -> None:
        self._names = None if request.num_logprobs is None else names
        options = request.stream_options
        self._with_usage = options is not None and options.include_usage
        self._head = {
            "id": self.id_prefix + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model_name,
        }

    def response(self, pieces: list[Piece], answer: Answer) -> Any:
        """Make the body of an answer that is not streamed."""
        choices = [self._choice(index, piece) for index, piece in enumerate(pieces)]
        return {**self._head, "object": self.whole, "choices": choices, "usage": answer.usage}

    def frame(self, index: int, piece: Piece, is_first: bool) -> Any:
        """Make a frame of a stream, which may be the first one of a choice."""
        more = {"usage": None} if self._with_usage else {}
        choices = [self._choice(index, piece, is_first)]
        return {**self._head, "object": self.chunk, "choices": choices, **more}

    def last_frames(self, answer: Answer) -> list[Any]:
        """Make the frames after all choices."""
        frame = {**self._head, "object": self.chunk, "choices": [], "usage": answer.usage}
        return [frame] if self._with_usage else []

    def _choice(self, index: int, piece: Piece, is_first: bool | None = None) -> Any:
        """Make a whole choice or, given whether it is the first, its part of a frame."""
        logprobs = self._logprobs(self._names, piece.entries) if self._names else None
        ends = {"logprobs": logprobs, "finish_reason": piece.finish_reason}
        return {"index": index, **self._content(piece, is_first), **ends}

    def _content(self, piece: Piece, is_first: bool | None) -> dict[str, Any]:
        return {"text": piece.text}

    def _logprobs(self, names: TokenNames, entries: list[TokenEntry]) -> Any:
        name = names.names
        return {
            "tokens": [name[entry.token] for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [
                None if e.logprob is None else {name[token]: value for token, value in e.top}
                for e in entries
            ],
            "text_offset": [entry.offset for entry in entries],
        }


class ChatCompletion(Completion):
    """Bodies of one chat completion."""

    id_prefix = "chatcmpl-"
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def _content(self, piece: Piece, is_first: bool | None) -> dict[str, Any]:
        if is_first is None:
            return {"message": {"role": "assistant", "content": piece.text, "refusal": None}}
        role = {"role": "assistant"} if is_first else {}
        return {"delta": role | ({"content": piece.text} if piece.text or is_first else {})}

    def _logprobs(self, names: TokenNames, entries: list[TokenEntry]) -> Any:
        def named(token: int, logprob: float | None) -> Any:
            content = list(names.bytes_of[token])
            return {"token": names.names[token], "logprob": logprob, "bytes": content}

        content = [
            named(entry.token, entry.logprob)
            | {"top_logprobs": [named(token, value) for token, value in entry.top]}
            for entry in entries
        ]
        return {"content": content, "refusal": None}


def infill_body(request: InfillRequest, model_name: str, text: str, answer: Answer) -> Any:
    """Make the body of an infill."""
    usage, (choice,) = answer.usage, answer.choices
    num_prompt, num_new = usage["prompt_tokens"], usage["completion_tokens"]
    num_read, prompt_seconds = num_prompt - answer.cached_tokens, answer.prefilled - answer.began
    reason = "eos" if choice.finish_reason == "stop" else "limit"
    body = {
        "content": text,
        "stop": True,
        "stop_type": "word" if choice.stopping_word else reason,
        "stopping_word": choice.stopping_word,
        "model": model_name,
        "tokens_predicted": num_new,
        "tokens_evaluated": num_prompt,
        "tokens_cached": answer.cached_tokens,
        "truncated": answer.left_out > 0,
        "timings": _timings("prompt", num_read, prompt_seconds)
        | _timings("predicted", num_new, answer.ended - answer.prefilled),
    }
    if request.response_fields is None:
        return body
    paths = body | {f"timings/{name}": value for name, value in body["timings"].items()}
    return {path: paths[path] for path in request.response_fields if path in paths}


def _timings(name: str, count: int, seconds: float) -> dict[str, float]:
    return {
        f"{name}_n": count,
        f"{name}_ms": 1e3 * seconds,
        f"{name}_per_token_ms": 1e3 * seconds / max(count, 1),
        f"{name}_per_second": count / max(seconds, 1e-9),
    }
