"""Prefill of prompts: several at a time, chunk by chunk, from the longest cached prefix.

Where a C function decodes the model, no result depends on how a prompt is cut into chunks.
Elsewhere, chunks and the program that prefills each depend on the positions in the prompt alone. So
a state is bit-identical regardless of batching and of what is cached.
"""

import dataclasses
import hashlib
from collections import OrderedDict, deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from simplernn_jax.inference.arguments import check_logits
from simplernn_jax.inference.engine import Engine, PrefixState
from simplernn_jax.inference.sampling import TokenLogprobs, token_logprobs
from simplernn_jax.serving.jobs import Job, Prefilled

GRID = 64
"""Tokens between the states of a prompt that are cached."""
MAX_JOBS = 8
"""Jobs prefilled at a time; where a C function decodes the model, by one call."""
LANES = 2
"""Prompts whose chunks one call of XLA's programs prefills, in less than twice the time of one. All
chunks of GRID tokens except the first of a prompt are prefilled alone, so that a long prompt takes
no longer than it must."""
CONCURRENT_CALLS = 2
"""Calls of XLA's programs at a time: on a CPU, a small one leaves cores idle."""
CHUNK_LENGTHS = (GRID, 32, 16, 4, 1)
"""XLA's programs prefill chunks of GRID tokens, and the tail of a prompt in the shorter ones."""


class _Chunk(NamedTuple):
    """Tokens to prefill after a state."""

    state: PrefixState
    tokens: np.ndarray
    lanes: int
    """Sequences of the largest program that may prefill it."""
    length: int
    """Tokens of a sequence in this program."""


@dataclasses.dataclass(eq=False)
class PrefilledJob:
    """A job with what its prefill has given."""

    job: Job
    event: Prefilled
    state: PrefixState
    num_started: int = 0
    """Choices that have a slot, or had one."""


_Steps = Generator[_Chunk, tuple[PrefixState, jax.Array], PrefilledJob]


@dataclasses.dataclass
class _Lane:
    job: Job
    steps: _Steps
    chunk: _Chunk


class Prefiller:
    """Prefills up to `MAX_JOBS` jobs in turn. Not thread-safe.

    `zero` is the state of one sequence before its first token. Jobs begin with prefixes of `cache`,
    to which their own are added.
    """

    def __init__(self, engine: Engine, zero: PrefixState, cache: "PrefixCache") -> None:
        self.finished: list[PrefilledJob] = []
        """Jobs that `start` and `step` have finished; the caller takes them."""
        self._engine = engine
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
        if self._engine.is_native:
            shapes = [(MAX_JOBS, GRID)]
        scored = set()
        for count, length in [(1, GRID), *shapes]:
            yield f"prefill of {count} x {length}"
            tokens = np.zeros((count, length), np.int32)
            num_tokens = np.full(count, length, np.int32)
            (state, hidden), *_ = self._engine.prefill([self._zero] * count, tokens, num_tokens)
            check_logits(state.logits)
            if length not in scored:
                scored.add(length)
                yield f"scores of {length}"
                self._engine.score(hidden, tokens[0])

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
            for lane, result in zip(lanes, results, strict=False):
                self._lanes.remove(lane)
                self._advance(lane.job, lane.steps, result)
            num_tokens += len(results) * first.length
        return num_tokens

    def _prefill(self, lanes: list[_Lane]) -> Any:
        """Prefill a chunk of each of `lanes`, all by the same program."""
        _, _, count, length = lanes[0].chunk
        if self._engine.is_native and len(lanes) == 1:
            count = 1
        states = [lane.chunk.state for lane in lanes] + [self._zero] * (count - len(lanes))
        tokens, num_tokens = np.zeros((count, length), np.int32), np.zeros(count, np.int32)
        for index, lane in enumerate(lanes):
            num_tokens[index] = len(lane.chunk.tokens)
            tokens[index, : num_tokens[index]] = lane.chunk.tokens
        results = self._engine.prefill(states, tokens, num_tokens)
        return jax.block_until_ready(results)  # or a long prompt would run far ahead

    def drop_cancelled(self) -> None:
        """Forget the jobs that were cancelled."""
        self._lanes = deque(lane for lane in self._lanes if not lane.job.is_cancelled)

    def _advance(self, job: Job, steps: _Steps, result: Any) -> None:
        try:
            self._lanes.append(_Lane(job, steps, steps.send(result)))
        except StopIteration as end:
            self.finished.append(end.value)

    def _steps(self, job: Job) -> _Steps:
        """Yield the chunks of a job's prompt, and take what they give."""
        tokens = job.tokens
        keys = prefix_keys(b"" if job.prefix is None else job.prefix.digest, tokens)
        position, state = 0, self._zero if job.prefix is None else job.prefix.state
        if not job.scores_prompt:  # whose log-probabilities no state holds
            num_keys, found = self._cache.longest(keys)
            position = num_keys * GRID
            state = state if found is None else found
        cached = position
        scores: list[TokenLogprobs] = []
        # The last position predicts a new token: its target here is any.
        targets = (
            np.append(tokens[1:], np.zeros(GRID + 1, np.int32)) if job.scores_prompt else tokens
        )
        if job.scores_prompt and job.prefix is not None and len(tokens):
            scores.append(_score(job.prefix.state.logits, tokens[:1]))
        while position < len(tokens):
            chunk = self._chunk(state, tokens, position)
            state, hidden = yield chunk
            if job.scores_prompt:
                of_chunk = targets[position : position + chunk.length]
                scores.append(self._engine.score(hidden, of_chunk))
            position += len(chunk.tokens)
            if position % GRID == 0 and is_kept(position, len(tokens)):
                self._cache.add(keys[position // GRID - 1], state)
        logprobs = None
        if job.scores_prompt:
            logprobs = _concatenated(scores, len(tokens) - (job.prefix is None))
        kept = jax.device_get(state) if job.keeps_state else None
        return PrefilledJob(job, Prefilled(cached, logprobs, kept), state)

    def _chunk(self, state: PrefixState, tokens: np.ndarray, position: int) -> _Chunk:
        """Make the chunk that begins at a position of a prompt."""
        left = tokens[position:]
        length, (count,) = self._engine.next_chunk(np.array([len(left)]), CHUNK_LENGTHS)
        lanes = 1 if position and length == GRID else LANES
        return _Chunk(state, left[:count], MAX_JOBS if self._engine.is_native else lanes, length)


_score = jax.jit(token_logprobs)


def _concatenated(scores: list[TokenLogprobs], length: int) -> TokenLogprobs:
    if not scores:
        return TokenLogprobs(*np.zeros((3, 0, 0), np.float32))
    parts = zip(*jax.device_get(scores), strict=True)
    return TokenLogprobs(*(np.concatenate(part)[:length] for part in parts))


def prefix_keys(digest: bytes, tokens: np.ndarray) -> list[bytes]:
    """Digest each prefix of GRID, 2 GRID, ... tokens; `digest` identifies what comes before."""
    keys = []
    for start in range(0, len(tokens) - GRID + 1, GRID):
        content = tokens[start : start + GRID].astype("<i4").tobytes()
        digest = hashlib.sha256(digest + content).digest()
        keys.append(digest)
    return keys


def is_kept(position: int, length: int) -> bool:
    """Decide whether the state at `position` of a prompt of `length` tokens is worth its memory.

    The last one always is. Of the others, the distances grow in proportion to the position, so that
    a long prompt keeps few, and any prompt that shares a prefix with it reuses most of that.
    """
    spacing = GRID << max(0, (position // GRID).bit_length() - 5)
    return position % spacing == 0 or position + GRID > length


class PrefixCache:
    """Recurrent states after prefixes of prompts, bounded in bytes; the least recently used go.

    States are kept at multiples of `GRID` tokens only. A prompt is always prefilled in chunks that
    end there, so a state from the cache has the bits of one computed anew.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_evicted = 0
        self._entries: OrderedDict[bytes, PrefixState] = OrderedDict()

    def longest(self, keys: list[bytes]) -> tuple[int, PrefixState | None]:
        """Return the longest cached prefix: its number of keys and its state, or (0, None)."""
        for index in range(len(keys), 0, -1):
            if keys[index - 1] in self._entries:
                self._entries.move_to_end(keys[index - 1])
                return index, self._entries[keys[index - 1]]
        return 0, None

    def add(self, key: bytes, state: PrefixState) -> None:
        """Add a state, and evict others until all fit."""
        size = _num_bytes(state)
        if key in self._entries or size > self.max_bytes:
            return
        self._entries[key] = state
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            _, evicted = self._entries.popitem(last=False)
            self.num_bytes -= _num_bytes(evicted)
            self.num_evicted += 1

    def clear(self) -> None:
        """Forget all states."""
        self._entries.clear()
        self.num_bytes = 0


def _num_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
