"""Memory: of a train step by the compiler's account, and of what decoding keeps, against T."""

import math
from typing import Any, NamedTuple

import jax
from flax import nnx

from benchmarks.attention.sides import SIDES, config_of
from benchmarks.jax_steps import our_step
from simplernn_jax.config import ModelConfig
from simplernn_jax.models import LanguageModel


class Sizes(NamedTuple):
    """How much is measured."""

    lengths: tuple[int, ...]
    layers: int
    """Of `base`, which has 4: compiling takes most of the time."""


QUICK = Sizes((1024, 65536), 1)
FULL = Sizes((256, 1024, 4096, 16384, 65536), 4)


def measure(sizes: Sizes) -> list[dict[str, Any]]:
    """By length and side: bytes of a train step on one row, and of the state of one row."""
    rows = []
    for length in sizes.lengths:
        configs = {side: config_of(side, length, num_layers=sizes.layers) for side in SIDES}
        rows.append(
            {
                "length": length,
                "layers": sizes.layers,
                "training_bytes": {
                    side: our_step(config).temporary_bytes for side, config in configs.items()
                },
                "state_bytes": {
                    side: state_bytes(config.model) for side, config in configs.items()
                },
            }
        )
    return rows


def state_bytes(model: ModelConfig) -> int:
    """What decoding one row keeps from token to token."""

    def make() -> Any:
        return LanguageModel(model, rngs=nnx.Rngs(0)).initial_state(1)

    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(nnx.eval_shape(make)))
