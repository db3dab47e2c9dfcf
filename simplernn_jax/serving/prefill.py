"""Prefill of prompts: several at a time, chunk by chunk, from the longest cached prefix.

Where a C function decodes the model, no result depends on how a prompt is cut into chunks.
Elsewhere, chunks and the program that prefills each depend on the positions in the prompt alone. So
a state is bit-identical regardless of batching and of what is cached.
"""

import dataclasses
import functools
import hashlib
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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


@dataclasses.dataclass(eq=False)
class Prompt:
    """The prompt of a job, of which the first `position` tokens are prefilled."""

    job: Job
    state: PrefixState
    keys: list[bytes]
    """Of its prefixes, in the cache."""
    position: int = 0
    num_cached: int = 0
    """Tokens that were found in the cache."""
    scores: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    num_started: int = 0
    """Choices that have a slot, or had one."""

    @property
    def left(self) -> np.ndarray:
        """Tokens that are not prefilled."""
        return self.job.tokens[self.position :]

    def result(self) -> Prefilled:
        """Make the event of the whole prompt."""
        logprobs = None
        if self.job.scores_prompt:
            length = len(self.job.tokens) - (self.job.prefix is None)  # nothing predicts the first
            none = TokenLogprobs(*np.zeros((3, 0, 0), np.float32))
            parts = zip(*jax.device_get(self.scores or [none]), strict=True)
            logprobs = TokenLogprobs(*(np.concatenate(part)[:length] for part in parts))
        kept = jax.device_get(self.state) if self.job.keeps_state else None
        return Prefilled(self.num_cached, logprobs, kept)


class Prefiller:
    """Prefills prompts, up to `MAX_JOBS` in turn. Not thread-safe.

    `zero` is the state of one sequence before its first token. Prompts begin with prefixes of
    `cache`, to which their own are added.
    """

    def __init__(self, engine: Engine, zero: PrefixState, cache: "PrefixCache") -> None:
        self._engine = engine
        self._zero = zero
        self._cache = cache
        self._pool = ThreadPoolExecutor(CONCURRENT_CALLS, "prefill")

    def compile(self) -> Iterator[str]:
        """Compile all programs, naming each before it is compiled."""
        shapes = [(LANES, length) for length in CHUNK_LENGTHS]
        if self._engine.is_native:
            shapes = [(MAX_JOBS, GRID)]
        for count, length in [(1, GRID), *shapes]:
            yield f"prefill of {count} x {length}"
            tokens = np.zeros(length, np.int32)
            results, _ = self._engine.prefill([self._zero] * count, [tokens] * count, length)
            state, hidden = results[0]
            check_logits(state.logits)
            self._engine.score(hidden, tokens)

    def begin(self, job: Job) -> Prompt:
        """Begin with the prompt of a job; it may be found in the cache as a whole."""
        prefix = job.prefix
        keys = prefix_keys(b"" if prefix is None else prefix.digest, job.tokens)
        prompt = Prompt(job, self._zero if prefix is None else prefix.state, keys)
        if not job.scores_prompt:  # whose log-probabilities no state holds
            number, found = self._cache.longest(keys)
            prompt.position = prompt.num_cached = number * GRID
            prompt.state = prompt.state if found is None else found
        elif prefix is not None and len(job.tokens):
            prompt.scores.append(_score(prefix.state.logits, job.tokens[:1]))
        return prompt

    def advance(self, prompts: deque[Prompt]) -> int:
        """Prefill the next chunk of the first of `prompts`, and of those like it; put them last.

        Returns:
          The number of tokens computed, idle lanes included.
        """
        lanes, length = program = self._program(prompts[0])
        alike = [prompt for prompt in prompts if self._program(prompt) == program]
        calls = [alike[at : at + lanes] for at in range(0, len(alike), lanes)]
        run = map if len(calls) == 1 else self._pool.map
        num_tokens = 0
        results = run(functools.partial(self._prefill, lanes, length), calls)
        for call, states in zip(calls, results, strict=True):
            for prompt, (state, hidden) in zip(call, states, strict=False):
                self._take(prompt, state, hidden)
                prompts.remove(prompt)
                prompts.append(prompt)
            num_tokens += len(states) * length
        return num_tokens

    def _program(self, prompt: Prompt) -> tuple[int, int]:
        """Return the lanes and the length of the program that prefills the next chunk."""
        length = self._engine.chunk_length(len(prompt.left), CHUNK_LENGTHS)
        if self._engine.is_native:
            return MAX_JOBS, length
        return 1 if prompt.position and length == GRID else LANES, length

    def _prefill(self, lanes: int, length: int, prompts: list[Prompt]) -> Any:
        """Prefill a chunk of each of `prompts`; return states and inputs of the head."""
        if self._engine.is_native and len(prompts) == 1:
            lanes = 1
        num_idle = lanes - len(prompts)
        states = [prompt.state for prompt in prompts] + [self._zero] * num_idle
        left = [prompt.left for prompt in prompts] + [np.zeros(0, np.int32)] * num_idle
        results, _ = self._engine.prefill(states, left, length)
        return jax.block_until_ready(results)  # or a long prompt would run far ahead

    def _take(self, prompt: Prompt, state: PrefixState, hidden: jax.Array) -> None:
        """Take the results of a chunk."""
        tokens, length = prompt.job.tokens, hidden.shape[1]
        if prompt.job.scores_prompt:
            # The last token of a prompt predicts a new one: its target here is any.
            targets = np.zeros(length, np.int32)
            following = tokens[prompt.position + 1 :][:length]
            targets[: len(following)] = following
            prompt.scores.append(self._engine.score(hidden, targets))
        prompt.state = state
        prompt.position = min(prompt.position + length, len(tokens))
        if prompt.position % GRID == 0:
            self._cache.add(prompt.keys[prompt.position // GRID - 1], state)


_score = jax.jit(token_logprobs)


def prefix_keys(digest: bytes, tokens: np.ndarray) -> list[bytes]:
    """Digest each prefix of GRID, 2 GRID, ... tokens; `digest` identifies what comes before."""
    keys = []
    for start in range(0, len(tokens) - GRID + 1, GRID):
        content = tokens[start : start + GRID].astype("<i4").tobytes()
        digest = hashlib.sha256(digest + content).digest()
        keys.append(digest)
    return keys


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


def _num_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
