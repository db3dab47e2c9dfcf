"""Initial parameters of a language model, traced once per configuration."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from flax import nnx

from simplernn_jax.config import ModelConfig
from simplernn_jax.models.language_model import LanguageModel
from simplernn_jax.models.simple_rnn import Recurrence
from simplernn_jax.ops import gated_linear_recurrence

Initialized = tuple[nnx.GraphDef[LanguageModel], nnx.State]
"""Graphdef and parameters, for `nnx.merge`."""


def initialize(
    config: ModelConfig,
    key: jax.Array,
    *,
    remat: str = "none",
    stack_layers: bool = False,
    recurrence: Recurrence = gated_linear_recurrence,
) -> Initialized:
    """Split ``LanguageModel(config, rngs=nnx.Rngs(key), ...)`` into graphdef and parameters.

    The result is the same, but a process traces each configuration only once, which takes 0.1 s
    for `configs/base.py`.

    Args:
      config, remat, stack_layers, recurrence: see `LanguageModel`.
      key: PRNG key of the initial values.

    Raises:
      ValueError: as `LanguageModel`.
    """
    # A copy, since the cache keeps its arguments, and a configuration may change later.
    init = _jitted(dataclasses.replace(config), remat, stack_layers, recurrence)
    return init(key)


def abstract_model(config: ModelConfig) -> Initialized:
    """Return graphdef and abstract parameters of a model."""
    abstract: Initialized = jax.eval_shape(lambda: initialize(config, jax.random.key(0)))
    return abstract


@functools.lru_cache(maxsize=32)
def _jitted(
    config: ModelConfig, remat: str, stack_layers: bool, recurrence: Recurrence
) -> Callable[[jax.Array], Initialized]:
    def init(key: jax.Array) -> Initialized:
        model = LanguageModel(
            config,
            rngs=nnx.Rngs(key),
            remat=remat,
            stack_layers=stack_layers,
            recurrence=recurrence,
        )
        return nnx.split(model, nnx.Param)

    return jax.jit(init)
