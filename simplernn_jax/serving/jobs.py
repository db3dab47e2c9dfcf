"""Requests of the HTTP side to the engine, and its replies."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from simplernn_jax.array_types import ModelState


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of one request, checked."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = dataclasses.field(default_factory=dict)
    banned_ids: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    seed: int = 0

    @property
    def has_penalties(self) -> bool:
        """True if new logits depend on earlier tokens by more than the model."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0)


class Root(NamedTuple):
    """State of one sequence that a prompt continues."""

    digest: bytes
    """Identifies the state in the prefix cache."""
    layers: ModelState
    logits: jax.Array
    """[vocab] float32 logits of the next token."""


class Logprobs(NamedTuple):
    """Log-probabilities of T tokens."""

    token: np.ndarray
    """[T] float32."""
    top: np.ndarray
    """[T, top] float32, in descending order."""
    top_ids: np.ndarray


class Prefilled(NamedTuple):
    """The prompt has been prefilled."""

    cached_tokens: int
    logprobs: Logprobs | None
    """Log-probabilities of the prompt's tokens except the first (with a root: of all)."""
    root: Root | None
    """State after the prompt, if `Job.keeps_state`."""


class NewTokens(NamedTuple):
    """New tokens of one choice."""

    choice: int
    tokens: np.ndarray
    logprobs: Logprobs | None
    finish_reason: str | None
    """None as long as more come, ``stop`` after a stop id, ``length`` after `Job.max_tokens`."""


class Failed(NamedTuple):
    """The job ended without a result."""

    message: str


Event = Prefilled | NewTokens | Failed


def event_bytes(event: Event) -> int:
    """Estimate the memory that an event takes."""
    arrays = [event.tokens] if isinstance(event, NewTokens) else []
    if not isinstance(event, Failed) and event.logprobs is not None:
        arrays += event.logprobs
    return 512 + sum(array.nbytes for array in arrays)


@dataclasses.dataclass(eq=False)
class Job:
    """A prompt and the continuations wanted of it."""

    tokens: np.ndarray
    """[n] int32; empty only with a root."""
    sampling: Sampling
    max_tokens: int = 0
    """Maximum number of new tokens of a choice; 0 only prefills."""
    num_choices: int = 1
    first_stream: int = 0
    """Random stream of the first choice; each further one has the next."""
    root: Root | None = None
    recent: np.ndarray | None = None
    """[n] int32 last ids of the root's text, for `Sampling.repetition_penalty`."""
    num_logprobs: int = 0
    """Log-probabilities of new tokens are reported if above 0, of this many alternatives."""
    scores_prompt: bool = False
    keeps_state: bool = False
    is_streamed: bool = False
    is_cancelled: bool = False
    cancelled_choices: set[int] = dataclasses.field(default_factory=set)
    unread_since: float | None = None
    """Monotonic seconds since which it pauses until more of its events are read."""
    deliver: Callable[["Job", "Event"], None] | None = None
    """Called in the event loop with each event."""
