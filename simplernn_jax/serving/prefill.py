"""Prefill of prompts: several at a time, chunk by chunk, from the longest cached prefix.

Where a C function decodes the model, no result depends on how a prompt is cut into chunks.
Elsewhere, chunks and the program that prefills each depend on the positions in the prompt alone. So
a state has the same bits whatever is prefilled beside it and whatever is cached.
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
from simplernn_jax.inference.arguments import check_logits
from simplernn_jax.serving.jobs import Job, Logprobs, Prefilled, Root
from simplernn_jax.serving.prefix_cache import GRID, Checkpoint, PrefixCache, is_kept, prefix_keys
from simplernn_jax.serving.slots import SlotPrograms, TokenLogprobs, token_logprobs

MAX_JOBS = 8
"""Jobs prefilled at a time; where a C function decodes the model, by one call."""
LANES = 2
"""Prompts whose chunks one call of XLA's programs prefills, in less than twice the time of one. All
chunks of GRID tokens but the first of a prompt have calls of their own, so that a long prompt takes
no longer than it must."""
CONCURRENT_CALLS = 2
"""Calls of XLA's programs at a time: on a CPU, a small one leaves cores idle."""
CHUNK_LENGTHS = (GRID, 32, 16, 4, 1)
"""XLA's programs prefill chunks of GRID tokens, and the tail of a prompt in the shorter ones."""


class _Chunk(NamedTuple):
    """Tokens to prefill after a state."""

    layers: ModelState
    tokens: np.ndarray
    lanes: int
    """Sequences of the largest program that may prefill it."""
    length: int
    """Tokens of a sequence in this program."""


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
    """Prefills up to `MAX_JOBS` jobs in turn. Not thread-safe.

    `zero` is the state of one sequence before its first token. Jobs begin with prefixes of `cache`,
    to which their own are added. If `is_native`, a C function decodes the model.
    """

    def __init__(
        self,
        programs: SlotPrograms,
        parameters: list[jax.Array],
        weights: Any,
        is_native: bool,
        zero: ModelState,
        cache: PrefixCache,
    ) -> None:
        self.finished: list[PrefilledJob] = []
        """Jobs that `start` and `step` have finished; the caller takes them."""
        self._programs, self._parameters, self._weights = programs, parameters, weights
        self._is_native = is_native
        self._zero = zero
        self._cache = cache
        self._lanes: deque[_Lane] = deque()
        self._pool = ThreadPoolExecutor(CONCURRENT_CALLS, "prefill")

    @property
    def jobs(self) -> list[Job]:
        """Jobs that have been started and not finished."""
        return [lane.job for lane in self._lanes]

    def compile(self) -> Iterator[str]:
        """Compile all programs, naming each before it is compiled."""
        shapes = [(LANES, length) for length in CHUNK_LENGTHS]
        if self._is_native:
            shapes = [(MAX_JOBS, GRID)]
        for count, length in [(1, GRID), *shapes]:
            yield f"prefill of {count} x {length}"
            tokens = np.zeros((count, length), np.int32)
            num_tokens = np.full(count, length, np.int32)
            ((_, logits, hidden), *_) = self._programs.prefill(
                self._weights, (self._zero,) * count, tokens, num_tokens
            )
            check_logits(logits)
            yield f"scores of {length}"
            self._programs.score(self._parameters, hidden, tokens[0])

    def start(self, job: Job) -> None:
        """Begin with a job; there must be fewer than `MAX_JOBS`."""
        self._advance(job, self._steps(job), None)

    def step(self) -> int:
        """Prefill the next chunk of the job that has waited longest, and of those like it.

        Returns:
          The number of tokens computed, those of idle lanes included.
        """
        first = self._lanes[0].chunk
        program = first.lanes, first.length
        alike = [x for x in self._lanes if (x.chunk.lanes, x.chunk.length) == program]
        calls = [alike[at : at + first.lanes] for at in range(0, len(alike), first.lanes)]
        run = map if len(calls) == 1 else self._pool.map
        num_tokens = 0
        for lanes, results in zip(calls, run(self._prefill, calls), strict=True):
            for lane, (layers, logits, hidden) in zip(lanes, results, strict=False):
                self._lanes.remove(lane)
                self._advance(lane.job, lane.steps, (Checkpoint(layers, logits), hidden))
            num_tokens += len(results) * first.length
        return num_tokens

    def _prefill(self, lanes: list[_Lane]) -> Any:
        """Prefill a chunk of each of `lanes`, all by the same program."""
        _, _, count, length = lanes[0].chunk
        if self._is_native and len(lanes) == 1:
            count = 1
        layers = [lane.chunk.layers for lane in lanes] + [self._zero] * (count - len(lanes))
        tokens, num_tokens = np.zeros((count, length), np.int32), np.zeros(count, np.int32)
        for index, lane in enumerate(lanes):
            num_tokens[index] = len(lane.chunk.tokens)
            tokens[index, : num_tokens[index]] = lane.chunk.tokens
        results = self._programs.prefill(self._weights, tuple(layers), tokens, num_tokens)
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
        # The last position predicts a new token: its target here is any.
        targets = (
            np.append(tokens[1:], np.zeros(GRID + 1, np.int32)) if job.scores_prompt else tokens
        )
        if job.scores_prompt and root is not None and len(tokens):
            scores.append(_score(root.logits[None], tokens[:1]))
        while position < len(tokens):
            layers = layers if state is None else state.layers
            chunk = self._chunk(layers, tokens, position)
            state, hidden = yield chunk
            if job.scores_prompt:
                of_chunk = targets[position : position + chunk.length]
                scores.append(self._programs.score(self._parameters, hidden, of_chunk))
            position += len(chunk.tokens)
            if position % GRID == 0 and is_kept(position, len(tokens)):
                self._cache.add(keys[position // GRID - 1], state)
        if state is not None:
            layers, logits = state
        else:
            assert root is not None
            logits = root.logits
        logprobs = None
        if job.scores_prompt:
            logprobs = _concatenated(scores, len(tokens) - (root is None))
        kept = Root(b"", *jax.device_get((layers, logits))) if job.keeps_state else None
        return PrefilledJob(job, Prefilled(cached, logprobs, kept), layers, jnp.asarray(logits))

    def _chunk(self, layers: ModelState, tokens: np.ndarray, position: int) -> _Chunk:
        """Make the chunk that begins at a position of a prompt."""
        left = tokens[position:]
        if self._is_native:
            return _Chunk(layers, left[:GRID], MAX_JOBS, GRID)
        length = next(length for length in CHUNK_LENGTHS if length <= len(left))
        lanes = 1 if position and length == GRID else LANES
        return _Chunk(layers, left[:length], lanes, length)


_score = jax.jit(token_logprobs)


def _concatenated(scores: list[TokenLogprobs], length: int) -> Logprobs:
    if not scores:
        top = np.zeros((0, 0))
        return Logprobs(np.zeros(0, np.float32), top, top.astype(np.int32))
    parts = zip(*jax.device_get(scores), strict=True)
    return Logprobs(*(np.concatenate(part)[:length] for part in parts))
