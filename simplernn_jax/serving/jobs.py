"""Requests of the HTTP side to the worker, and its replies."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from simplernn_jax.data.infilling import InfillPrompt
from simplernn_jax.inference.engine import PrefixState
from simplernn_jax.inference.sampling import Sampling, TokenLogprobs
from simplernn_jax.serving.requests import RequestError


class Prefix(NamedTuple):
    """What a prompt continues."""

    state: PrefixState
    """Of one sequence."""
    digest: bytes
    """Identifies the state in the prefix cache."""
    recent: np.ndarray
    """[n] int32 last ids, for `Sampling.repetition_penalty` and the text of new tokens."""
    description: Any = None
    """Of a named state, as the API shows it."""


class Prefilled(NamedTuple):
    """The prompt has been prefilled."""

    seconds: float
    """When, by `time.perf_counter`."""
    cached_tokens: int
    left_out: int
    """Tokens that were left out of the prompt, for lack of time."""
    logprobs: TokenLogprobs | None
    """Log-probabilities of the prompt's tokens except the first (after a prefix: of all)."""
    state: PrefixState | None
    """State after the prompt, if `Job.keeps_state`."""


class NewTokens(NamedTuple):
    """New tokens of one choice."""

    choice: int
    tokens: np.ndarray
    logprobs: TokenLogprobs | None
    finish_reason: str | None
    """None as long as more come, ``stop`` after a stop id, ``length`` after `Job.max_tokens`."""


Event = Prefilled | NewTokens | RequestError
"""An error ends all choices of the job."""


@dataclasses.dataclass(eq=False)
class Job:
    """A prompt and the continuations wanted of it."""

    tokens: np.ndarray
    """[n] int32; empty only after a prefix."""
    sampling: Sampling
    max_tokens: int = 0
    """Maximum number of new tokens of a choice; 0 only prefills."""
    num_choices: int = 1
    first_stream: int = 0
    """Random stream of the first choice; each further one has the next."""
    prefix: Prefix | None = None
    num_logprobs: int | None = None
    """Log-probabilities are reported unless it is None, with this many alternatives."""
    scores_prompt: bool = False
    echoed: str = ""
    """Text of the prompt, if the answer begins with it."""
    stops: list[str] = dataclasses.field(default_factory=list)
    """Strings that end a text, which does not contain them."""
    ends_at_repeats: bool = False
    """Whether a text ends before `RepeatedLines`."""
    ending_ids: frozenset[int] = frozenset()
    """Ids whose text has one of `stops` in it: no token after one of them is needed."""
    cached_at: tuple[int, ...] | None = None
    """Numbers of tokens of the prompt after which its state is cached, where a C function decodes
    the model; None stands for the whole prompt, and for states of the new tokens too. Elsewhere,
    states have fixed positions in the prompt."""
    infill: InfillPrompt | None = None
    """About `tokens`, if the new ones are the text between a prefix and a suffix."""
    prompt_seconds: float | None = None
    """Time from `created` after which optional tokens of `infill` are left out of the prompt."""
    max_seconds: float = math.inf
    """Time from the end of prefill after which the next tokens are the last ones."""
    created: float = dataclasses.field(default_factory=time.monotonic)
    keeps_state: bool = False
    is_streamed: bool = False
    is_cancelled: bool = False
    cancelled_choices: set[int] = dataclasses.field(default_factory=set)
    is_paused: bool = False
    """True while its client has too much to read."""
    deliver: Callable[["Job", "Event"], None] | None = None
    """Called in the event loop with each event."""

    @property
    def text(self) -> np.ndarray:
        """The ids of the prompt, after the last ones of its prefix."""
        if self.prefix is None:
            return self.tokens
        return np.concatenate([self.prefix.recent, self.tokens])
