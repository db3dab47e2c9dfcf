"""Answers to requests: text and log-probabilities from the events of their jobs, as JSON."""

import asyncio
import dataclasses
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import jax

from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.inference.engine import PrefixState
from simplernn_jax.inference.sampling import TokenLogprobs
from simplernn_jax.inference.text import StopStrings, TextStream
from simplernn_jax.serving.jobs import Event, Job, NewTokens, Prefilled
from simplernn_jax.serving.requests import RequestError
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
    top = list(zip(ids, logprobs.top[index, :num_top].tolist(), strict=True))
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
        self._stream = TextStream(tokenizer, job.recent)
        self._stops = StopStrings(job.stops)
        self._stop_ids = frozenset(job.sampling.stop_ids)
        self._offset = len(job.echoed)
        """Characters returned."""
        self._entries: list[TokenEntry] = []

    def feed(self, new: NewTokens) -> Piece:
        """Take new tokens and return what they complete."""
        tokens, text = new.tokens.tolist(), ""
        is_simple = self._num_logprobs is None and not self._stops.stops
        for index, several in enumerate([tokens] if is_simple else [[token] for token in tokens]):
            self.num_tokens += len(several)
            if self._num_logprobs is not None:
                start = self._offset + len(text) + len(self._stops.held_back)
                entry = token_entry(several[0], start, new.logprobs, index, self._num_logprobs)
                self._entries.append(entry)
            decoded = self._stream.feed([t for t in several if t not in self._stop_ids])
            text += self._stops.feed(decoded)
            if self._stops.has_ended:
                return self._take(text, "stop")
        if new.finish_reason is not None:
            text += self._stops.finish(self._stream.finish())
        return self._take(text, new.finish_reason)

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
        self._choices = [ChoiceText(tokenizer, job) for job in jobs for _ in range(job.num_choices)]
        self._cached_tokens = 0
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
        new = sum(choice.num_tokens for choice in self._choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }

    @property
    def _is_complete(self) -> bool:
        return all(choice.finish_reason is not None for choice in self._choices)

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
        pieces = [Piece("", [], None) for _ in self._choices]
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
            self._cached_tokens += event.cached_tokens
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
                self._choices[index].finish_reason = piece.finish_reason
            return [(index, piece) for index in indices]
        choice = self._choices[first + event.choice]
        if choice.finish_reason is not None:
            return []
        now = time.perf_counter()
        metrics.observe(choice.num_tokens, len(event.tokens), now - choice.last_seconds)
        choice.last_seconds = now
        piece = choice.feed(event)
        if piece.finish_reason is not None:
            job.cancelled_choices.add(event.choice)
        return [(first + event.choice, piece)]


class TokenNames:
    """Names and bytes of the ids of a tokenizer.

    A token's name is its text; bytes that are part of a character are ``bytes:\\xNN``, as in
    OpenAI's API. Tokens without a text, or with one that another token has, are ``token_id:N``.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.bytes_of = [tokenizer.decode_bytes([number]) for number in range(vocab_size)]
        names = [_name(content) for content in self.bytes_of]
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
    """Bodies of one text completion; `names` if it has log-probabilities."""

    id_prefix = "cmpl-"
    whole = "text_completion"
    chunk = "text_completion"

    def __init__(self, model_name: str, names: TokenNames | None) -> None:
        self._names = names
        self._head = {
            "id": self.id_prefix + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model_name,
        }

    def response(self, pieces: list[Piece], usage: Any) -> Any:
        """Make the body of an answer that is not streamed."""
        choices = [self.choice(index, piece) for index, piece in enumerate(pieces)]
        return {**self._head, "object": self.whole, "choices": choices, "usage": usage}

    def frame(self, choices: list[Any], **more: Any) -> Any:
        """Make a frame of a stream."""
        return {**self._head, "object": self.chunk, "choices": choices, **more}

    def choice(self, index: int, piece: Piece, is_first: bool | None = None) -> Any:
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
