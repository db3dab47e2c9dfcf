"""Parallelism: time of a train step against T at constant tokens, and what must wait for what."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.attention.program_work import Work, count_work
from benchmarks.attention.sides import PROGRAMS, all_in_jax, config_of
from benchmarks.interleave import Effort, alternate, median
from benchmarks.jax_steps import BY_SCAN, random_batch
from simplernn_jax.config import Config
from simplernn_jax.models.simple_rnn import Recurrence
from simplernn_jax.ops import gated_linear_recurrence
from simplernn_jax.training.gradient import abstract_model, make_gradient


class Sizes(NamedTuple):
    """How much is measured."""

    lengths: tuple[int, ...]
    tokens: int
    """Of a step, at every length."""
    layers: int
    """Of `base`, which has 4: compiling takes most of the time."""
    effort: Effort


QUICK = Sizes((256, 1024, 4096), 4096, 1, Effort(2, 1))
FULL = Sizes((256, 1024, 4096, 16384), 16384, 4, Effort(3, 1))


def measure(sizes: Sizes) -> list[dict[str, Any]]:
    """By length: microseconds per token of every program, and the longest chain of one step."""
    rows = []
    for length in sizes.lengths:
        steps = {
            name: make(config_of(side, length, sizes.tokens // length, num_layers=sizes.layers))
            for name, (side, make) in PROGRAMS.items()
        }
        times = alternate(steps, sizes.effort)
        rows.append(
            {
                "length": length,
                "tokens": sizes.tokens,
                "layers": sizes.layers,
                "us_per_token": {
                    name: 1e6 * median(blocks) / sizes.tokens for name, blocks in times.items()
                },
                "chain": chains(length, sizes.layers),
            }
        )
    return rows


def chains(length: int, layers: int) -> dict[str, float]:
    """Operations of a gradient's longest chain. `ours` on a CPU goes token by token as `scan`."""
    found = {}
    for name, (side, _) in PROGRAMS.items():
        config = config_of(side, length, num_layers=layers)
        if name != "ours":
            recurrence = BY_SCAN if name == "scan" else gated_linear_recurrence
            with all_in_jax():
                found[name] = gradient_work(config, recurrence).chain
    return found


def gradient_work(config: Config, recurrence: Recurrence = gated_linear_recurrence) -> Work:
    """`Work` of the gradient of one batch; to be called inside of `all_in_jax`."""
    _, params = abstract_model(config)
    key = jax.random.key_data(jax.random.key(0))
    gradient = make_gradient(config, recurrence)
    return count_work(gradient, params, random_batch(config), (), key, jnp.int32(0))
