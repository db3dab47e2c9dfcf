"""Prefill of prompts: several at a time, chunk by chunk, from the longest cached prefix.

How a prompt is cut into chunks, and by which program each is prefilled, depends on the positions in
the prompt alone. So its state has the same bits whatever is prefilled beside it and whatever is
cached.
"""

import dataclasses
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from simplernn_jax.array_types import ModelState
from simplernn_jax.serving.jobs import Job, Logprobs, Prefilled, Root
from simplernn_jax.serving.prefix_cache import (
    GRID,
    Checkpoint,
    PrefixCache,
    is_kept,
    prefix_keys,
)
from simplernn_jax.serving.slots import SlotPrograms, TokenLogprobs, token_logprobs

LANES = 8
"""Prompts whose tails are prefilled by one call, which takes little longer than for one. Chunks of
GRID tokens have calls of their own, so that a long prompt takes no longer than it must."""
CONCURRENT_CALLS = 2
"""Such calls at a time: on a CPU, a call for one prompt leaves cores idle."""
CHUNK_LENGTHS = (GRID, 32, 16, 4, 1)
"""Prompts are prefilled in chunks of GRID tokens, the tail of one in the shorter ones."""


class _Chunk(NamedTuple):
    """Tokens to prefill after a state."""

    layers: ModelState
    tokens: np.ndarray


class PrefilledJob(NamedTuple):
    """A job with what its prefill has given."""

    job: Job
    event: Prefilled
    layers: ModelState
    logits: jax.Array


_Steps = Generator[_Chunk, tuple[Checkpoint, jax.Array], PrefilledJob | None]


@dataclasses.dataclass
class _Lane:
    job: Job
    steps: _Steps
    chunk: _Chunk


class Prefiller:
    """Prefills up to `LANES` jobs in turn. Not thread-safe.

    Args:
      programs, parameters: of the model.
      zero: state of one sequence before its first token.
      cache: prefixes to begin with, and to which their states are added.
    """

    def __init__(
        self,
        programs: SlotPrograms,
        parameters: list[jax.Array],
        zero: ModelState,
        cache: PrefixCache,
    ) -> None:
        self.finished: list[PrefilledJob] = []
        """Jobs that `start` and `step` have finished; the caller takes them."""
        self._programs, self._parameters, self._zero = programs, parameters, zero
        self._cache = cache
        self._lanes: deque[_Lane] = deque()
        self._pool = ThreadPoolExecutor(CONCURRENT_CALLS, "prefill")

    @property
    def jobs(self) -> list[Job]:
        """Jobs that have been started and not finished."""
        return [lane.job for lane in self._lanes]

    def compile(self) -> Iterator[str]:
        """Compile all programs, naming each before it is compiled."""
        for length in CHUNK_LENGTHS:
            count = 1 if length == GRID else LANES
            yield f"prefill of {count} x {length}"
            tokens = np.zeros((count, length), np.int32)
            ((_, hidden, last), *_) = self._programs.prefill(
                self._parameters, (self._zero,) * count, tokens
            )
            yield f"scores of {length}"
            self._programs.score(self._parameters, hidden, tokens[0])
        yield "logits"
        self._programs.next_logits(self._parameters, last)

    def start(self, job: Job) -> None:
        """Begin with a job; there must be fewer than `LANES`."""
        self._advance(job, self._steps(job), None)

    def step(self) -> int:
        """Prefill the next chunk of the job that has waited longest, and of those of its length.

        Returns:
          The number of tokens computed, those of idle lanes included.
        """
        length = len(self._lanes[0].chunk.tokens)
        alike = [lane for lane in self._lanes if len(lane.chunk.tokens) == length]
        calls = [[lane] for lane in alike] if length == GRID else [alike]
        num_tokens = 0
        for lanes, results in zip(calls, self._pool.map(self._prefill, calls), strict=True):
            for lane, (layers, hidden, last) in zip(lanes, results, strict=False):
                self._lanes.remove(lane)
                self._advance(lane.job, lane.steps, (Checkpoint(layers, last), hidden))
            num_tokens += len(results) * length
        return num_tokens

    def _prefill(self, lanes: list[_Lane]) -> Any:
        """Prefill a chunk of each of `lanes`, all of one length."""
        length = len(lanes[0].chunk.tokens)
        count = 1 if length == GRID else LANES
        layers = [lane.chunk.layers for lane in lanes] + [self._zero] * (count - len(lanes))
        tokens = np.zeros((count, length), np.int32)
        tokens[: len(lanes)] = [lane.chunk.tokens for lane in lanes]
        results = self._programs.prefill(self._parameters, tuple(layers), tokens)
        return jax.block_until_ready(results)  # or a long prompt would run far ahead

    def drop_cancelled(self) -> None:
        """Forget the jobs that were cancelled."""
        self._lanes = deque(lane for lane in self._lanes if not lane.job.is_cancelled)

    def _advance(self, job: Job, steps: _Steps, result: Any) -> None:
        try:
            self._lanes.append(_Lane(job, steps, steps.send(result)))
        except StopIteration as end:
            if end.value is not None:
                self.finished.append(end.value)

    def _steps(self, job: Job) -> _Steps:
        """Yield the chunks of a job's prompt, and take what they give."""
        tokens, root = job.tokens, job.root
        keys = prefix_keys(b"" if root is None else root.digest, tokens)
        position, state = 0, None
        if not job.scores_prompt:  # whose log-probabilities no state holds
            num_keys, state = self._cache.longest(keys)
            position = num_keys * GRID
        cached = position
        layers = self._zero if root is None else root.layers
        scores: list[TokenLogprobs] = []
        if job.scores_prompt and root is not None and len(tokens):
            scores.append(_score(root.logits[None], tokens[:1]))
        while position < len(tokens):
            length = next(n for n in CHUNK_LENGTHS if n <= len(tokens) - position)
            chunk = tokens[position : position + length]
            before = layers if state is None else state.layers
            state, hidden = yield _Chunk(before, chunk)
            position += length
            if job.scores_prompt:
                # The last position predicts a new token: its target here is any.
                targets = np.append(tokens, 0)[position - length + 1 : position + 1]
                scores.append(self._programs.score(self._parameters, hidden, targets))
            if position % GRID == 0 and is_kept(position, len(tokens)):
                self._cache.add(keys[position // GRID - 1], state)
        if state is not None:
            layers = state.layers
            logits = self._programs.next_logits(self._parameters, state.hidden)
        else:
            assert root is not None
            logits = root.logits
        logprobs = None
        if job.scores_prompt:
            logprobs = _concatenated(scores, len(tokens) - (root is None))
        kept = Root(b"", *jax.device_get((layers, logits))) if job.keeps_state else None
        return PrefilledJob(job, Prefilled(cached, logprobs, kept), layers, jnp.asarray(logits))


_score = jax.jit(token_logprobs)


def _concatenated(scores: list[TokenLogprobs], length: int) -> Logprobs:
    if not scores:
        top = np.zeros((0, 0))
        return Logprobs(np.zeros(0, np.float32), top, top.astype(np.int32))
    parts = zip(*jax.device_get(scores), strict=True)
    return Logprobs(*(np.concatenate(part)[:length] for part in parts))
