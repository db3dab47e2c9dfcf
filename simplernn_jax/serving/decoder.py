"""Continuous batching of the jobs of one set of parameters: prefill, slots, and results."""

import dataclasses
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from simplernn_jax.array_types import ModelState
from simplernn_jax.inference.programs import BLOCK_TOKENS
from simplernn_jax.models import LanguageModel
from simplernn_jax.serving.jobs import Event, Job, Logprobs, NewTokens, Sampling
from simplernn_jax.serving.prefill import LANES, Prefiller
from simplernn_jax.serving.prefix_cache import PrefixCache
from simplernn_jax.serving.slots import (
    Block,
    Slots,
    SlotSettings,
    empty_slots,
    split_parameters,
)

PREFILL_TOKENS = 512
"""Tokens prefilled between two blocks while slots decode: a long prompt never stalls them."""
SHORT_BLOCK = 8
"""Tokens of a block while anything is streamed or waits; else BLOCK_TOKENS."""


@dataclasses.dataclass(eq=False)
class _Choice:
    """A continuation in a slot."""

    job: Job
    index: int
    num_tokens: int = 0

    @property
    def is_cancelled(self) -> bool:
        return self.job.is_cancelled or self.index in self.job.cancelled_choices


class _Dispatched(NamedTuple):
    """A block of tokens that the device computes."""

    block: Block
    with_logprobs: bool
    choices: list[_Choice | None]
    """Of all slots."""


@dataclasses.dataclass
class _Ready:
    """A prefilled job whose choices wait for slots."""

    job: Job
    layers: ModelState
    logits: jax.Array
    num_started: int = 0


class Decoder:
    """Slots and prefix cache of one set of parameters. Not thread-safe.

    Args:
      model: its parameters are never changed.
      num_slots: sequences decoded at a time.
      cache_bytes: limit of the prefix cache.
    """

    def __init__(self, model: LanguageModel, num_slots: int, cache_bytes: int) -> None:
        self.model = model
        self.cache = PrefixCache(cache_bytes)
        self.waiting: deque[Job] = deque()
        self._programs, self._parameters = split_parameters(model)
        self._vocab_size = model.config.vocab_size
        self._zero = jax.block_until_ready(model.initial_state(1))
        self._start(num_slots)

    def _start(self, num_slots: int) -> None:
        """Forget all jobs."""
        self.waiting.clear()
        self._slots = empty_slots(self.model, num_slots)
        self._choices: list[_Choice | None] = [None] * num_slots
        self._prefiller = Prefiller(self._programs, self._parameters, self._zero, self.cache)
        self._ready: deque[_Ready] = deque()
        self._in_flight: _Dispatched | None = None
        self._events: list[tuple[Job, Event]] = []

    @property
    def num_active(self) -> int:
        """Number of slots that decode."""
        return sum(choice is not None for choice in self._choices)

    @property
    def num_waiting(self) -> int:
        """Number of jobs without a slot."""
        return len(self.waiting) + len(self._ready) + len(self._prefiller.jobs)

    @property
    def is_idle(self) -> bool:
        """True if `step` has nothing to do."""
        is_busy = self.waiting or self._prefiller.jobs or self._ready or self._in_flight
        return not is_busy and not self.num_active

    def compile(self) -> Iterator[str]:
        """Compile all programs, naming each before it is compiled."""
        slot = self._slot_of(Job(np.zeros(0, np.int32), Sampling()), 0, self._zero, self._no_logits)
        yield from self._prefiller.compile()
        yield "insertion"
        self._slots = self._programs.insert(self._slots, np.int32(0), slot)
        yield f"decoding in {len(self._choices)} slots"
        self._dispatch()

    @property
    def _no_logits(self) -> jax.Array:
        return jnp.zeros(self._vocab_size, jnp.float32)

    def step(self) -> list[tuple[Job, Event]]:
        """Prefill a little, decode a block, and return what has become known."""
        self._events = []
        self._free_cancelled()
        previous, self._in_flight = self._in_flight, None
        if previous and (self.waiting or self._prefiller.jobs):
            self._collect(previous)  # prefill would compete with the block
            previous = None
        self._admit()
        is_first = any(choice is not None and not choice.num_tokens for choice in self._choices)
        # The device computes this block while the previous one is handled.
        block = self._dispatch() if self.num_active else None
        if previous:
            self._collect(previous)
        if block and is_first:
            self._collect(block)  # first tokens do not wait for the next block
        else:
            self._in_flight = block
        return self._events

    def fail_all(self) -> list[Job]:
        """Drop all jobs and return them."""
        jobs = [*self.waiting, *(ready.job for ready in self._ready)]
        jobs += [choice.job for choice in self._choices if choice is not None]
        jobs += self._prefiller.jobs
        self._start(len(self._choices))
        self.cache.clear()
        return list(dict.fromkeys(jobs))

    def _free_cancelled(self) -> None:
        for slot, choice in enumerate(self._choices):
            if choice is not None and choice.is_cancelled:
                self._choices[slot] = None
        self._ready = deque(ready for ready in self._ready if not ready.job.is_cancelled)
        self._prefiller.drop_cancelled()

    def _admit(self) -> None:
        """Fill free slots with prefilled jobs, and prefill the next ones."""
        budget, prefiller = PREFILL_TOKENS, self._prefiller
        if len(self.waiting) > self.num_active:
            budget *= 4  # more prompts wait than streams are stalled
        while True:
            self._start_choices()
            if self._ready or (budget <= 0 and (self.num_active or self._events)):
                return
            while self.waiting and len(prefiller.jobs) < LANES:
                prefiller.start(self.waiting.popleft())
            if not prefiller.finished:
                if not prefiller.jobs:
                    return
                budget -= prefiller.step()
            for job, event, layers, logits in prefiller.finished:
                self._events.append((job, event))
                if job.max_tokens:
                    self._ready.append(_Ready(job, layers, logits))
            prefiller.finished.clear()

    def _start_choices(self) -> None:
        """Insert choices of prefilled jobs into free slots, in order."""
        for slot, choice in enumerate(self._choices):
            if not self._ready:
                return
            if choice is None:
                ready = self._ready[0]
                index = ready.num_started
                self._slots = self._programs.insert(
                    self._slots,
                    np.int32(slot),
                    self._slot_of(ready.job, index, ready.layers, ready.logits),
                )
                self._choices[slot] = _Choice(ready.job, index)
                ready.num_started += 1
                if ready.num_started == ready.job.num_choices:
                    self._ready.popleft()

    def _slot_of(self, job: Job, choice: int, layers: jax.Array, logits: jax.Array) -> Slots:
        sampling = job.sampling
        is_stop, in_prompt = np.zeros((2, self._vocab_size), np.bool_)
        bias = np.zeros(self._vocab_size, np.float32)
        is_stop[list(sampling.stop_ids)] = True
        in_prompt[job.tokens] = True
        for number, value in sampling.logit_bias.items():
            bias[number] = value
        bias[list(sampling.banned_ids)] = -np.inf

        def one(value: Any, dtype: Any = np.float32) -> Any:
            return np.array([value], dtype)

        return Slots(
            layers=layers,
            logits=logits[None],
            position=one(0, np.int32),
            remaining=one(job.max_tokens, np.int32),
            in_prompt=one(in_prompt, np.bool_),
            counts=one(np.zeros(self._vocab_size), np.int32),
            settings=SlotSettings(
                seed=one(sampling.seed, np.uint32),
                stream=one(choice, np.int32),
                temperature=one(sampling.temperature),
                top_k=one(sampling.top_k, np.int32),
                top_p=one(sampling.top_p),
                min_p=one(sampling.min_p),
                repetition_penalty=one(sampling.repetition_penalty),
                presence_penalty=one(sampling.presence_penalty),
                frequency_penalty=one(sampling.frequency_penalty),
                bias=one(bias),
                is_stop=one(is_stop, np.bool_),
            ),
        )

    def _dispatch(self) -> _Dispatched:
        active = [choice for choice in self._choices if choice is not None]
        is_urgent = self.waiting or self._prefiller.jobs or any(c.job.is_streamed for c in active)
        length = BLOCK_TOKENS
        if is_urgent:
            # Many streams are worth more than the latency of each.
            length = SHORT_BLOCK * (1 + (2 * len(active) > len(self._choices)))
        with_logprobs = any(choice.job.num_logprobs for choice in active)
        block, self._slots = self._programs.decode(
            self._parameters,
            self._slots,
            np.array([choice is not None for choice in self._choices]),
            np.int32(length),
            np.bool_(with_logprobs),
            np.bool_(any(choice.job.sampling.has_penalties for choice in active)),
        )
        return _Dispatched(block, with_logprobs, list(self._choices))

    def _collect(self, dispatched: _Dispatched) -> None:
        """Wait for a block, report its tokens, and free the slots of what has ended."""
        block, with_logprobs, choices = dispatched
        tokens, counts = jax.device_get((block.tokens, block.counts))
        logprobs = jax.device_get(block.logprobs) if with_logprobs else None
        for slot, choice in enumerate(choices):
            if choice is None or self._choices[slot] is not choice:
                continue
            job, count = choice.job, int(counts[slot])
            new = tokens[slot, :count]
            choice.num_tokens += count
            reason = None
            if count and int(new[-1]) in job.sampling.stop_ids:
                reason = "stop"
            elif choice.num_tokens >= job.max_tokens:
                reason = "length"
            if reason is not None:
                self._choices[slot] = None
            of_tokens = None
            if logprobs is not None and job.num_logprobs:
                of_tokens = Logprobs(*(x[slot, :count] for x in logprobs))
            self._events.append((job, NewTokens(choice.index, new, of_tokens, reason)))
