"""Continuous batching of the jobs of one set of parameters: prefill, slots, and results.

The number of slots N is fixed, because XLA may order float32 sums differently for another batch
size. Within one N, a slot gives the same bits whatever its index and its neighbors. Where a C
function decodes the model, N changes no bit either.
"""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simplernn_jax.inference.engine import (
    MAX_BLOCK,
    Block,
    Engine,
    PrefixState,
    Sequences,
    insert_sequences,
)
from simplernn_jax.inference.lookup import (
    MAX_SEQUENCES,
    RECENT,
    WINDOW,
    History,
    decode_with_drafts,
    make_history,
    use_lookup,
)
from simplernn_jax.inference.sampling import Penalties, Sampling, TokenLogprobs
from simplernn_jax.models import LanguageModel
from simplernn_jax.serving.jobs import Event, Job, NewTokens
from simplernn_jax.serving.prefill import GRID, MAX_JOBS, Prefiller, PrefixCache, PrefixKeys, Prompt

PREFILL_TOKENS = 512
"""Tokens prefilled between two blocks while slots decode: a long prompt never stalls them."""
SHORT_SECONDS = 5e-3
"""Time of a block while anything waits, or is streamed and at most half of the slots decode."""
LONG_SECONDS = 80e-3
"""Time of other blocks."""
FIRST_BLOCK = 2
"""Tokens of the block that gives a stream its first ones."""
EVENT_SECONDS = 20e-3
"""Minimum time between two events of a sequence, except before its last: each costs a frame."""


@dataclasses.dataclass(eq=False)
class _Choice:
    """A continuation in a slot."""

    job: Job
    index: int
    text: np.ndarray
    """The last tokens so far, in which drafts are looked up."""
    keys: PrefixKeys | None
    """Of all tokens so far; None if no state of the new ones is cached."""
    num_tokens: int = 0
    parts: list[tuple[np.ndarray, TokenLogprobs | None]] = dataclasses.field(default_factory=list)
    """Tokens that no event has reported."""
    reported: float = -math.inf
    """Monotonic seconds of the last event."""

    def take(self, reason: str | None) -> NewTokens:
        """Make the event of the tokens that none has reported."""
        tokens, logprobs = jax.tree.map(lambda *parts: np.concatenate(parts), *self.parts)
        self.parts = []
        return NewTokens(self.index, tokens, logprobs, reason)


_Rows = list[tuple[int, _Choice | None]]
"""Slots and their choices."""
_Dispatched = tuple[Block, _Rows, float, list[_Choice | None], PrefixState | None]
"""A block of tokens that the device computes, its rows, when it began, the choices of all slots,
and their states after it if they are cached."""


class Scheduler:
    """Slots and prefix cache of one set of parameters. Not thread-safe, except `waiting`."""

    def __init__(self, model: LanguageModel, num_slots: int, cache_bytes: int) -> None:
        self.model = model
        self.cache = PrefixCache(cache_bytes)
        self.waiting: deque[Job] = deque()
        self._engine = Engine(model)
        self._vocab_size = model.config.vocab_size
        self._zero = jax.block_until_ready(_empty_state(model, 1))
        self._prefiller = Prefiller(self._engine, self._zero, self.cache)
        nothing = new_sequence(_NO_JOB, 0, self._vocab_size)
        slots = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_slots, *x.shape)), nothing)
        self._slots: Sequences = slots._replace(state=_empty_state(model, num_slots))
        self._choices: list[_Choice | None] = [None] * num_slots
        self._prefilling: deque[Prompt] = deque()
        self._ready: deque[Prompt] = deque()
        """Prefilled prompts with choices that wait for a slot."""
        self._history: tuple[list[_Choice | None], History] | None = None
        """Where the last block looked up drafts, with its tokens, and the choices of the block."""
        self._num_uncached = 0
        """Maximum number of tokens of a choice since its last state that is cached."""
        self._in_flight: _Dispatched | None = None
        self._collected = 0.0
        self._token_seconds = LONG_SECONDS
        """Seconds per token of all slots in the last block."""
        self._events: list[tuple[Job, Event]] = []

    @property
    def num_active(self) -> int:
        """Number of slots that decode."""
        return sum(choice is not None for choice in self._choices)

    @property
    def num_waiting(self) -> int:
        """Number of jobs without a slot."""
        return len(self.waiting) + len(self._ready) + len(self._prefilling)

    @property
    def _is_crowded(self) -> bool:
        """True if throughput matters more than latency."""
        return 2 * self.num_active > len(self._choices)

    @property
    def is_paused(self) -> bool:
        """True if `step` has nothing to do before a job continues or another one comes."""
        has_new = self.waiting or self._prefilling or (self._ready and None in self._choices)
        running = [c for c in self._choices if c is not None and not c.job.is_paused]
        return not (has_new or running or self._in_flight)

    @property
    def is_idle(self) -> bool:
        """True if there are no jobs."""
        return self.is_paused and not self._ready and not self.num_active

    def compile(self) -> Iterator[str]:
        """Compile all programs, naming each before it is compiled."""
        yield from self._prefiller.compile()
        yield "insertion"
        num_slots = len(self._choices)
        for count in (1, 2):
            self._insert([(num_slots, self._prefiller.begin(_NO_JOB), 0)] * count)
        yield f"decoding in {num_slots} slots"
        _, self._slots = self._engine.decode(self._slots, np.ones(num_slots, bool), MAX_BLOCK)
        if use_lookup(self._engine, 1):
            yield "decoding with drafts"
            self._decode_with_drafts([], MAX_BLOCK)
        _copy(self._slots.state)
        _sequence(self._slots.state, 0)

    def step(self) -> list[tuple[Job, Event]]:
        """Prefill a little, decode a block, and return its events."""
        self._events = []
        previous, self._in_flight = self._in_flight, None
        if previous and (self.waiting or self._prefilling):
            self._collect(previous)  # prefill would compete with the block
            previous = None
        self._admit()
        running = [None if c is None or c.job.is_paused else c for c in self._choices]
        is_first = any(choice is not None and not choice.num_tokens for choice in running)
        block = self._dispatch(running) if any(running) else None
        if previous:
            self._collect(previous)
        if block and (is_first or not self._is_crowded):
            self._collect(block)  # neither first tokens nor new jobs wait for the next block
        else:
            # The device computes this block while the previous one is handled.
            self._in_flight = block
        return self._events

    def drop_cancelled(self) -> None:
        """Forget cancelled jobs and choices; no other thread may submit jobs meanwhile."""
        self.waiting = deque(job for job in self.waiting if not job.is_cancelled)
        self._prefilling = deque(p for p in self._prefilling if not p.job.is_cancelled)
        self._ready = deque(prompt for prompt in self._ready if not prompt.job.is_cancelled)
        for slot, choice in enumerate(self._choices):
            if choice is None:
                continue
            if choice.job.is_cancelled or choice.index in choice.job.cancelled_choices:
                self._choices[slot] = None

    def _admit(self) -> None:
        """Fill free slots with prefilled jobs, and prefill some of the next."""
        budget = PREFILL_TOKENS
        if len(self.waiting) > self.num_active:
            budget *= 8  # more prompts wait than streams are stalled
        while True:
            self._start_choices()
            if self._ready or budget <= 0:
                return
            while self.waiting and len(self._prefilling) < MAX_JOBS:
                self._prefilling.append(self._prefiller.begin(self.waiting.popleft()))
            if not self._prefilling:
                return
            finished = [prompt for prompt in self._prefilling if not len(prompt.left)]
            for prompt in finished:
                self._prefilling.remove(prompt)
                self._events.append((prompt.job, prompt.result()))
                if prompt.job.max_tokens:
                    self._prefiller.heal(prompt)
                    self._ready.append(prompt)
            if not finished:
                budget -= self._prefiller.advance(self._prefilling)

    def _start_choices(self) -> None:
        """Insert choices of prefilled jobs into free slots, in order."""
        new: list[tuple[int, Prompt, int]] = []
        for slot, choice in enumerate(self._choices):
            if choice is None and self._ready:
                prompt = self._ready[0]
                new.append((slot, prompt, prompt.num_started))
                keys = prompt.keys if prompt.caches_new_tokens else None
                text = np.concatenate([prompt.job.text, *(token for token, _ in prompt.kept)])
                choice = _Choice(prompt.job, prompt.num_started, text[-RECENT:], keys)
                choice.parts += prompt.kept
                self._choices[slot] = choice
                prompt.num_started += 1
                if prompt.num_started == prompt.job.num_choices:
                    self._ready.popleft()
        for start in range(0, len(new), MAX_JOBS):
            self._insert(new[start : start + MAX_JOBS])

    def _insert(self, new: list[tuple[int, Prompt, int]]) -> None:
        """Insert up to MAX_JOBS (slot, prompt, number of its choice)."""
        if len(new) > 1:
            idle = len(self._choices), new[0][1], 0
            new = new + [idle] * (MAX_JOBS - len(new))
        sequences = [
            new_sequence(prompt.job, choice, self._vocab_size) for _, prompt, choice in new
        ]
        self._slots = insert_sequences(
            self._slots,
            np.array([slot for slot, _, _ in new], np.int32),
            tuple(prompt.state for _, prompt, _ in new),
            jax.tree.map(lambda *x: np.stack(x), *sequences),
        )

    def _dispatch(self, choices: list[_Choice | None]) -> _Dispatched:
        """Compute a block of the slots that have a choice in `choices`."""
        active = [choice for choice in choices if choice is not None]
        is_streamed = any(choice.job.is_streamed for choice in active)
        is_short = self.num_waiting or (is_streamed and not self._is_crowded)
        length = round((SHORT_SECONDS if is_short else LONG_SECONDS) / self._token_seconds)
        has_drafts = use_lookup(self._engine, len(active))
        if any(c.job.is_streamed and not (c.job.infill or c.num_tokens) for c in active):
            length = min(length, FIRST_BLOCK)
        elif has_drafts:
            length = max(length, WINDOW)  # even if it takes longer without a draft
        caches = any(choice.keys is not None for choice in active)
        length = max(1, min(length, GRID - self._num_uncached if caches else MAX_BLOCK))
        rows = list(enumerate(choices))
        if length >= WINDOW and has_drafts:
            rows = [row for row in rows if row[1] is not None]
            block = self._decode_with_drafts(rows, length)
        else:
            is_active = np.array([choice is not None for choice in choices])
            block, self._slots = self._engine.decode(self._slots, is_active, length)
            self._history = None
        states = None
        if caches:
            self._num_uncached += length
            if self._num_uncached >= GRID // 2:  # also of jobs that pause
                self._num_uncached, states = 0, _copy(self._slots.state)
        return block, rows, time.monotonic(), list(self._choices), states

    def _decode_with_drafts(self, rows: _Rows, length: int) -> Block:
        """Compute a block of a few slots, whose arrays have these rows, and idle ones."""
        slots, few = [slot for slot, _ in rows], [choice for _, choice in rows]
        if self._history is None or self._history[0] != few:
            texts = [choice.text for choice in few if choice is not None]
            size = min(len(self._choices), MAX_SEQUENCES)
            self._history = few, make_history(self._vocab_size, texts, size)
        block, self._slots, history = decode_with_drafts(
            self._engine, self._slots, self._history[1], slots, length
        )
        self._history = few, history
        return block

    def _collect(self, dispatched: _Dispatched) -> None:
        """Wait for a block, report its tokens, and free the slots of what has ended."""
        block, rows, began, choices, states = dispatched
        tokens, counts, states = jax.device_get((block.tokens, block.counts, states))
        now = time.monotonic()
        if counts.max():  # else every slot had ended before the block
            self._token_seconds = (now - max(began, self._collected)) / counts.max()
        self._collected = now
        logprobs = None
        if any(choice is not None and choice.job.num_logprobs is not None for _, choice in rows):
            logprobs = jax.device_get(block.logprobs)
        for row, (slot, choice) in enumerate(rows):
            if choice is None or self._choices[slot] is not choice:
                continue
            job, count = choice.job, int(counts[row])
            new = tokens[row, :count]
            choice.text = np.concatenate([choice.text, new])[-RECENT:]
            choice.num_tokens += count
            reason = None
            last = int(new[-1]) if count else -1
            if last in job.sampling.stop_ids or last in job.ending_ids:
                reason = "stop"
            elif choice.num_tokens >= job.max_tokens:
                reason = "length"
            if reason is not None:
                self._choices[slot] = None
            if choice.keys is not None:
                choice.keys = choice.keys.followed_by(new[:-1] if reason == "stop" else new)
                if reason is not None:  # no later block changes its state
                    self.cache.add(choice.keys.last, _sequence(self._slots.state, slot))
            of_tokens = None
            if logprobs is not None and job.num_logprobs is not None:
                of_tokens = TokenLogprobs(*(x[row, :count] for x in logprobs))
            choice.parts.append((new, of_tokens))
            if reason is not None or now - choice.reported >= EVENT_SECONDS:
                self._events.append((job, choice.take(reason)))
                choice.reported = now
        if states is None:
            return
        leaves, structure = jax.tree.flatten(states)
        for slot, choice in enumerate(choices):
            if choice is not None and choice is self._choices[slot] and choice.keys is not None:
                # NumPy takes less time than to start a program.
                state = jax.tree.unflatten(structure, [x[slot : slot + 1].copy() for x in leaves])
                self.cache.add(choice.keys.last, state)


_NO_JOB = Job(np.zeros(0, np.int32), Sampling())


@jax.jit
def _copy(state: PrefixState) -> PrefixState:
    return jax.tree.map(jnp.copy, state)


@jax.jit
def _sequence(state: PrefixState, index: int) -> PrefixState:
    """Copy the state of one sequence."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1), state)


def _empty_state(model: LanguageModel, batch_size: int) -> PrefixState:
    logits = jnp.zeros((batch_size, model.config.vocab_size), jnp.float32)
    return PrefixState(model.initial_state(batch_size), logits)


def new_sequence(job: Job, choice: int, vocab_size: int) -> Sequences:
    """Make arrays of a choice of a job, without the axis B and the state after its prompt."""
    sampling = job.sampling
    numpy: Any = np  # whose arrays take the place of JAX's
    nothing: Any = None
    in_prompt = numpy.zeros(vocab_size, np.bool_)
    in_prompt[job.text] = True
    settings = sampling.arrays(vocab_size)
    settings.is_stop[list(job.ending_ids)] = True
    return Sequences(
        state=nothing,
        stream=numpy.int32(job.first_stream + choice),
        position=numpy.int32(0),
        remaining=numpy.int32(job.max_tokens),
        settings=settings,
        penalties=Penalties(
            repetition=numpy.float32(sampling.repetition_penalty),
            presence=numpy.float32(sampling.presence_penalty),
            frequency=numpy.float32(sampling.frequency_penalty),
            in_prompt=in_prompt,
            counts=numpy.zeros(vocab_size, np.int32),
        ),
        wants_logprobs=numpy.bool_(job.num_logprobs is not None),
    )
