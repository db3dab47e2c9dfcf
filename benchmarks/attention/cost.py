"""Computation: operations a token by count, and tokens a second in reading and writing.

Operations are counted in the program before XLA (`program_work`), the recurrence in chunks: on a
CPU it is one function in C, of which XLA knows nothing, and which goes token by token with about
as many.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.attention.parallelism import gradient_work
from benchmarks.attention.program_work import count_work
from benchmarks.attention.sides import SIDES, all_in_jax, config_of
from benchmarks.decoding import prompts, recompute, writing
from benchmarks.interleave import Call, Effort, alternate, median
from simplernn_jax.config import Config
from simplernn_jax.models import LanguageModel
from simplernn_jax.training.gradient import abstract_model

LEAST_READ = 16
"""Tokens of a cache that are filled when writing is timed: all slots are looked at anyway."""


class Sizes(NamedTuple):
    """How much is measured."""

    counted: tuple[int, ...]
    """Lengths whose operations are counted."""
    read: tuple[int, ...]
    """Lengths of prompts whose reading is timed, in one forward pass."""
    written: tuple[int, ...]
    """Contexts after which writing is timed."""
    new_tokens: int
    effort: Effort


_COUNTED = (256, 1024, 4096, 16384, 65536)
QUICK = Sizes(_COUNTED, (256, 1024, 4096), (256, 1024, 4096, 16384), 64, Effort(2, 1))
FULL = Sizes(_COUNTED, (256, 1024, 4096, 16384), _COUNTED, 128, Effort(3, 1))


def measure(sizes: Sizes) -> dict[str, Any]:
    """Operations and microseconds a token, by length and side."""
    return {
        "flops_per_token": {
            str(length): {side: flops_per_token(side, length) for side in SIDES}
            for length in sizes.counted
        },
        "reading_us": {
            str(length): {
                side: us / length for side, us in _time_reading(length, sizes.effort).items()
            }
            for length in sizes.read
        },
        "writing_us": {
            str(length): {
                side: us / sizes.new_tokens
                for side, us in _time_writing(length, sizes.new_tokens, sizes.effort).items()
            }
            for length in sizes.written
        },
    }


def flops_per_token(side: str, length: int) -> dict[str, float]:
    """Of training and reading a row of `length`, and of writing a token after so many."""
    config = config_of(side, length)
    with all_in_jax():
        return {
            "training": gradient_work(config).flops / length,
            "reading": _forward_flops(config, length) / length,
            "writing": _forward_flops(config, 1),
        }


def _forward_flops(config: Config, tokens: int) -> float:
    """Of a forward pass over `tokens` tokens; one token comes after a full state."""
    graph, params = abstract_model(config)

    def last_logits(params: Any, ids: jax.Array, state: Any) -> jax.Array:
        hidden, _ = nnx.merge(graph, params).encode(ids, state)
        return nnx.merge(graph, params).logits(hidden[:, -1:])

    def make_state() -> Any:
        return LanguageModel(config.model, rngs=nnx.Rngs(0)).initial_state(1)

    state = nnx.eval_shape(make_state) if tokens == 1 else None
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    return count_work(last_logits, params, ids, state).flops


def _time_reading(length: int, effort: Effort) -> dict[str, float]:
    calls: dict[str, Call] = {}
    for side in SIDES:
        model = config_of(side, length).model
        tokens = prompts(model, 1, length)
        calls[side] = recompute(LanguageModel(model, rngs=nnx.Rngs(0)), tokens)
    return _microseconds(calls, effort)


def _time_writing(context: int, new_tokens: int, effort: Effort) -> dict[str, float]:
    calls: dict[str, Call] = {}
    for side in SIDES:
        config = config_of(side, context).model
        model = LanguageModel(config, rngs=nnx.Rngs(0))
        calls[side] = writing(model, prompts(config, 1, LEAST_READ), new_tokens)
    return _microseconds(calls, effort)


def _microseconds(calls: dict[str, Call], effort: Effort) -> dict[str, float]:
    return {name: 1e6 * median(blocks) for name, blocks in alternate(calls, effort).items()}


def crossing(
    by_length: Mapping[str, Mapping[str, float]], slower: str, faster: str
) -> float | None:
    """Length from which `slower` costs more than `faster`, between those measured by a straight
    line in logarithms; None if it never does, 0 if it always does."""
    lengths = np.array(sorted(map(int, by_length)), float)
    gap = np.array(
        [np.log(by_length[str(int(n))][slower] / by_length[str(int(n))][faster]) for n in lengths]
    )
    if gap[0] > 0:
        return 0.0
    if gap[-1] <= 0:
        return None
    after = int(np.argmax(gap > 0))
    share = -gap[after - 1] / (gap[after] - gap[after - 1])
    logs = np.log(lengths)
    return float(np.exp(logs[after - 1] + share * (logs[after] - logs[after - 1])))
