"""Prefill of prompts: several at a time, chunk by chunk, from the longest cached prefix.

Where a C function decodes the model, no result depends on how a prompt is cut into chunks, and
states are cached at any position. Elsewhere, chunks and the program that prefills each depend on
the positions in the prompt alone, and states are cached at multiples of `GRID`. So a state is
bit-identical regardless of batching and of what is cached.
"""

import dataclasses
import functools
import hashlib
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from simplernn_jax.data.infilling import heal
from simplernn_jax.inference.arguments import check_logits
from simplernn_jax.inference.engine import Engine, PrefixState
from simplernn_jax.inference.sampling import TokenLogprobs, keep_only, token_logprobs
from simplernn_jax.serving.jobs import Job, Prefilled

GRID = 64
"""Maximum number of tokens between the states of a prompt that are cached."""
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
    keys: "PrefixKeys"
    cached_at: tuple[int, ...] = ()
    """Numbers of tokens after which the state is cached, in addition to multiples of `GRID`."""
    caches_new_tokens: bool = False
    """True if states after new tokens are cached, too."""
    position: int = 0
    num_cached: int = 0
    """Tokens that were found in the cache."""
    scores: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    left_out: int = 0
    """Tokens left out for lack of time."""
    kept: list[tuple[np.ndarray, TokenLogprobs | None]] = dataclasses.field(default_factory=list)
    """Typed tokens that `heal` keeps: the new text begins with them."""
    num_started: int = 0
    """Choices that have a slot, or had one."""

    @property
    def left(self) -> np.ndarray:
        """Tokens that are not prefilled, up to the next position where the state is cached."""
        stops = [self.position // GRID * GRID + GRID, *self.cached_at]
        return self.job.tokens[self.position : min(at for at in stops if at > self.position)]

    def result(self) -> Prefilled:
        """Make the event of the whole prompt."""
        logprobs = None
        if self.job.scores_prompt:
            length = len(self.job.tokens) - (self.job.prefix is None)  # nothing predicts the first
            none = TokenLogprobs(*np.zeros((3, 0, 0), np.float32))
            parts = zip(*jax.device_get(self.scores or [none]), strict=True)
            logprobs = TokenLogprobs(*(np.concatenate(part)[:length] for part in parts))
        kept = jax.device_get(self.state) if self.job.keeps_state else None
        return Prefilled(time.perf_counter(), self.num_cached, self.left_out, logprobs, kept)


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
        self._seconds = 0.0
        """Time of the last call of `advance`, for up to `GRID` tokens of each of its prompts."""

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
        prefix, cached_at = job.prefix, job.cached_at
        root = hashlib.sha256(b"" if prefix is None else prefix.digest).digest()
        keys = PrefixKeys(root, job.tokens)
        if not self._engine.is_native:
            cached_at = ()
        elif cached_at is None or job.scores_prompt:
            cached_at = (len(job.tokens),)
        caches_new = self._engine.is_native and job.cached_at is None and self._cache.max_bytes > 0
        state = self._zero if prefix is None else prefix.state
        prompt = Prompt(job, state, keys, cached_at, caches_new)
        if not job.scores_prompt:  # whose log-probabilities no state holds
            self._look_up(prompt)
        elif prefix is not None and len(job.tokens):
            prompt.scores.append(_score(prefix.state.logits, job.tokens[:1]))
        return prompt

    def _look_up(self, prompt: Prompt) -> None:
        """Continue the longest prefix in the cache, unless more is prefilled."""
        position, found = self._cache.longest(prompt.keys)
        if found is not None and position > prompt.position:
            prompt.position = prompt.num_cached = position
            prompt.state = found

    def advance(self, prompts: deque[Prompt]) -> int:
        """Prefill the next chunk of the first of `prompts`, and of those like it; put them last.

        Returns:
          The number of tokens computed, idle lanes included.
        """
        began = time.monotonic()
        for prompt in prompts:
            self._leave_out(prompt, began)
        if not all(len(prompt.left) for prompt in prompts):
            return 0  # the rest of one is in the cache
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
        self._seconds = time.monotonic() - began
        return num_tokens

    def heal(self, prompt: Prompt) -> None:
        """Continue a prefilled prompt by the typed tokens that stay as they are."""
        job, typed = prompt.job, []
        if job.infill is None:
            return

        def extend(state: PrefixState, token: int) -> PrefixState:
            ids = np.array([token], np.int32)
            has_scores = job.num_logprobs is not None
            typed.append((ids, jax.device_get(_score(state.logits, ids)) if has_scores else None))
            idle, nothing = [self._zero] * (lanes - 1), [ids[:0]] * (lanes - 1)
            results, _ = self._engine.prefill([state, *idle], [ids, *nothing], length)
            return results[0][0]

        length = self._engine.chunk_length(1, CHUNK_LENGTHS)
        lanes = 1 if self._engine.is_native else LANES
        state, num_kept, ids = heal(job.infill, prompt.state, extend)
        prompt.state = state._replace(logits=keep_only(state.logits, ids))
        prompt.kept = typed[:num_kept]

    def _leave_out(self, prompt: Prompt, now: float) -> None:
        """Leave out optional tokens for which there is no time, and prefill the rest."""
        job = prompt.job
        start = max(prompt.position, job.prefix is None)  # BOS is kept
        end = 0 if job.infill is None else job.infill.num_optional
        if job.prompt_seconds is None or start >= end or prompt.position % GRID:
            return
        num_chunks = -(-(len(job.tokens) - end) // GRID)
        if now + num_chunks * self._seconds < job.created + job.prompt_seconds:
            return
        job.tokens = np.concatenate([job.tokens[:start], job.tokens[end:]])
        prompt.left_out = end - start
        prompt.keys = PrefixKeys(prompt.keys.digests[0], job.tokens)
        prompt.cached_at = tuple(at - prompt.left_out for at in prompt.cached_at)
        self._look_up(prompt)

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
        prompt.position += min(length, len(prompt.left))
        if prompt.position % GRID == 0 or prompt.position in prompt.cached_at:
            self._cache.add(prompt.keys.at(prompt.position), state)


_score = jax.jit(token_logprobs)


class PrefixKeys:
    """Keys of the prefixes of `tokens`; `digest`, a SHA-256, identifies what comes before them.

    A key has the digest of all but the last 1 to `GRID` tokens, and the ids of these, so that
    cached prefixes are found without hashing each one.
    """

    def __init__(self, digest: bytes, tokens: np.ndarray) -> None:
        self.content = tokens.astype("<i4").tobytes()
        self.digests = [digest]
        """Of the first 0, GRID, 2 GRID, ... tokens."""
        for start in range(0, len(self.content) - _GRID_BYTES, _GRID_BYTES):
            part = self.content[start : start + _GRID_BYTES]
            self.digests.append(hashlib.sha256(self.digests[-1] + part).digest())

    def at(self, position: int) -> bytes:
        """Return the key of the first `position` tokens."""
        index = max(position - 1, 0) // GRID
        return self.digests[index] + self.content[index * _GRID_BYTES : 4 * position]

    def followed_by(self, tokens: np.ndarray) -> "PrefixKeys":
        """Return the keys after the last digest, with `tokens` appended."""
        tail = self.content[(len(self.digests) - 1) * _GRID_BYTES :]
        return PrefixKeys(self.digests[-1], np.concatenate([np.frombuffer(tail, "<i4"), tokens]))

    @property
    def last(self) -> bytes:
        """The key of all tokens."""
        return self.at(len(self.content) // 4)


_GRID_BYTES = 4 * GRID


class PrefixCache:
    """Recurrent states after prefixes of texts, bounded in bytes; the least recently used are
    evicted.

    The bits of a state from the cache must be the ones that prefilling its tokens gives.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_evicted = 0
        self._entries: OrderedDict[bytes, PrefixState] = OrderedDict()
        self._size = 0
        """Bytes of a state: all are of one model."""
        self._keys_with: dict[bytes, set[bytes]] = {}
        """Keys of entries by their digest."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all states."""
        return len(self._entries) * self._size

    def entries(self) -> list[tuple[bytes, PrefixState]]:
        """List keys and states, the least recently used first."""
        return list(self._entries.items())

    def longest(self, keys: PrefixKeys) -> tuple[int, PrefixState | None]:
        """Return the longest cached prefix: its number of tokens and its state, or (0, None)."""
        position, state, length = 0, None, len(keys.content) // 4
        for index, digest in enumerate(keys.digests):
            start, alike = index * GRID, self._keys_with.get(digest, set())
            if len(alike) > GRID:  # such as all short texts
                alike = alike & {*map(keys.at, range(start + 1, min(length, start + GRID) + 1))}
            for key in sorted(alike, key=len):
                tail = key[_DIGEST_BYTES:]
                if keys.content.startswith(tail, 4 * start):
                    position, state = start + len(tail) // 4, self._entries[key]
                    self._entries.move_to_end(key)  # an edit further up will need it, too
        return position, state

    def add(self, key: bytes, state: PrefixState) -> None:
        """Add a state, and evict others until all fit."""
        self._size = self._size or sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        if key in self._entries or self._size > self.max_bytes:
            return
        self._entries[key] = state
        self._keys_with.setdefault(key[:_DIGEST_BYTES], set()).add(key)
        self.evict(self.max_bytes)

    def evict(self, max_bytes: int) -> None:
        """Evict the least recently used states until the others fit into `max_bytes`."""
        while self.num_bytes > max_bytes:
            key, _ = self._entries.popitem(last=False)
            alike = self._keys_with[key[:_DIGEST_BYTES]]
            alike.remove(key)
            if not alike:
                del self._keys_with[key[:_DIGEST_BYTES]]
            self.num_evicted += 1


_DIGEST_BYTES = hashlib.sha256().digest_size
