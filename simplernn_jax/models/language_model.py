"""The language model: tokens and state to logits and state."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from simplernn_jax.array_types import (
    LogicalAxes,
    ModelState,
    SegmentIds,
    TimeShardActivations,
    TimeShardLogits,
    Tokens,
)
from simplernn_jax.config import ModelConfig
from simplernn_jax.errors import UserError
from simplernn_jax.models.blocks import BLOCKS
from simplernn_jax.models.layer_stack import LayerList, LayerStack
from simplernn_jax.models.layers import Dense, Embedding, kernel_init
from simplernn_jax.models.mixers.attention import KVCache
from simplernn_jax.models.mixers.token_mixer import MakeMixer, find_mixer
from simplernn_jax.ops.checks import FLOATING, INTEGER, check_array, check_segment_ids
from simplernn_jax.ops.rms_norm import rms_norm
from simplernn_jax.ops.segments import reset_state, select_sequences
from simplernn_jax.parallel.mesh import partition_spec
from simplernn_jax.parallel.tensor import fused_projection


class LanguageModel(nnx.Module):
    """Embedding, a stack of layers, and an LM head.

    ``block="plain"`` is the original PyTorch implementation's model (docs/pytorch.md): embedding
    N(0, 1), layers without norm or residual, an LM head with bias. The others are pre-norm residual
    blocks, for deep models, with a final norm before the LM head, which may be tied to the
    embedding: ``block="parallel"`` is `ParallelBlock`, ``"residual"`` is `ResidualBlock`, and
    ``"swiglu"`` is `SwiGLUBlock`. Each layer has any registered mixer; with ``block="swiglu"``,
    some are models of flash-linear-attention (docs/mixers.md).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        remat: str = "none",
        stack_layers: bool = False,
    ):
        """Initialize the parameters, all float32.

        Args:
          config: sizes and precision; see `ModelConfig`.
          rngs: source of initial values.
          remat: rematerialization policy, ``none`` or ``block``; see `rematerialize`.
          stack_layers: stack the parameters of all layers, to be sharded over pipeline stages; see
            `LayerStack`.

        Raises:
          UserError: a mixer that is not registered.
          ValueError: `stack_layers` with layers of different mixers.
        """
        self.config = dataclasses.replace(config)
        self.dtype = dtype = jnp.dtype(config.precision)
        plain = config.block == "plain"
        normal = kernel_init(config) or nnx.initializers.normal(1.0)
        self.embedding: nnx.Embed = Embedding(
            config.vocab_size, config.hidden_dim, init=normal, rngs=rngs
        )
        layers = _make_layers(config, rngs)
        for index, layer in enumerate(layers):
            layer.mixer.initialize_depth(index, len(layers))
        self.starts_from_zero = all(layer.mixer.starts_from_zero for layer in layers)
        self.layers = LayerStack(layers) if stack_layers else LayerList(layers)
        self.final_scale = None if plain else nnx.Param(jnp.ones(config.hidden_dim, jnp.float32))
        tied = config.tie_embeddings and not plain
        options: dict[str, Any] = {} if plain else {"kernel_init": normal}
        options["use_bias"] = config.block != "swiglu"
        sizes = (config.hidden_dim, config.vocab_size, ("embed", "vocab"))
        self.head = None if tied else Dense(*sizes, rngs=rngs, dtype=dtype, **options)
        self.remat = remat

    def initial_state(self, batch_size: int) -> ModelState:
        """Return the state before the first token: one entry per layer, or one for stacked layers.

        Every array begins with axis B. Those of the package's mixers are zeros: KV caches
        have the dtype ``precision`` (their lengths int32); recurrent states and the inputs of
        convolutions are float32, and float64 under ``jax_enable_x64``.
        """
        return self.layers.initial_state(batch_size)

    def state_axes(self) -> ModelState:
        """Return the logical axes of each array of the state, in its structure."""
        return self.layers.state_axes()

    def reset_states(
        self, state: ModelState, where: Bool[Array, "B"], initial: ModelState | None = None
    ) -> ModelState:
        """Return the initial state for the sequences `where`, `state` for the others.

        `initial` is a learned initial state, leaves ``[1, ...]``; None: the model's.
        """
        if initial is None and self.starts_from_zero:
            return reset_state(state, where)
        initial = self.initial_state(where.shape[0]) if initial is None else initial
        return jax.tree.map(partial(select_sequences, where), initial, state)

    def select_states(
        self, keep_previous: Bool[Array, "B"], previous: ModelState, current: ModelState
    ) -> ModelState:
        """Select states by sequence, without copying caches.

        Of a `KVCache` only the length is restored: the next token overwrites the slot of the
        dropped one, which no query attends to until then.

        Args:
          keep_previous: True selects `previous`, False `current`.
          previous: the states before the last token.
          current: the states after it, of the same structure, which the result has too.
        """

        def select(old: Any, new: Any) -> Any:
            if isinstance(new, KVCache):
                return new._replace(length=select(old.length, new.length))
            return select_sequences(keep_previous, old, new)

        return jax.tree.map(select, previous, current, is_leaf=lambda x: isinstance(x, KVCache))

    def hidden_states(
        self,
        tokens: Tokens,
        state: ModelState | None = None,
        segment_ids: SegmentIds | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> tuple[TimeShardActivations, ModelState]:
        """Compute the final hidden states; arguments and errors as in `__call__`.

        Returns:
          ``[B, T, D]`` float32; with stacked layers, only the time shard of this stage,
          ``[B, T / stages, D]``. And the state after the last token.
        """
        sizes = check_array("tokens", tokens, "B T", INTEGER)
        check_segment_ids(segment_ids, sizes)
        check_ids(tokens, self.config.vocab_size)
        x = self.embedding(tokens)
        if self.config.is_convolved:
            # Scale to unit variance; a tied head needs 1/sqrt(D) initialization.
            x = x * self.config.hidden_dim**0.5
        x, state = self.layers(x, state, segment_ids, dropout_key, remat=self.remat)
        if self.final_scale is not None:
            x = rms_norm(x, epsilon=self.config.norm_epsilon) * self.final_scale[...][None, None]
        return x, state

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Map hidden states ``[..., D]`` to logits ``[..., vocab]``, float32.

        Inside `jax.shard_map` with ``tensor`` > 1, logits of this device's shard of the
        vocabulary, ``[..., vocab / tensor]``.

        Raises:
          ValueError: the last axis is not D.
          TypeError: wrong dtype.
        """
        check_array("hidden", hidden, "... D", FLOATING, {"D": self.config.hidden_dim})
        if self.head is not None:
            return self.head(hidden)
        return fused_projection(hidden, [self.embedding.embedding[...].T], self.dtype)[0]

    def __call__(
        self,
        tokens: Tokens,
        state: ModelState | None = None,
        segment_ids: SegmentIds | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> tuple[TimeShardLogits, ModelState]:
        """Compute logits of the next token at every position, and the state after the last.

        Args:
          tokens: ``[B, T]`` integers in ``[0, vocab_size)``. Eager calls check the range on the
            host; under `jax.jit`, ids out of range give NaN (zeros if the vocabulary is sharded).
          state: the state that an earlier call returned, as in `initial_state`; None is the initial
            one.
          segment_ids: ``[B, T]``; a change of id resets the state to the initial one. `state`
            belongs to the first token's segment.
          dropout_key: PRNG key of dropout; None disables it.

        Returns:
          ``[B, T, vocab]`` float32, ``[B, T / stages, vocab]`` with stacked layers; and the state.

        Raises:
          ValueError: wrong ranks, shapes inconsistent with each other or the model, ids outside
            the vocabulary, or stacked layers outside of `jax.shard_map`.
          TypeError: wrong dtypes, or the state of a layer of another kind.
        """
        hidden, state = self.hidden_states(tokens, state, segment_ids, dropout_key=dropout_key)
        return self.logits(hidden), state


def _make_layers(config: ModelConfig, rngs: nnx.Rngs) -> list[Any]:
    """Return the layers, initialized in their order from `rngs`.

    Under `jax.jit`, a scan initializes successive layers of one mixer: a program with the code of
    one layer loads three times as fast, for the 4 layers of `configs/base.py`. Eager calls would
    compile a program for each configuration.
    """
    make = partial(BLOCKS[config.block], config)
    rngs_graph, rngs_state = nnx.split(rngs)
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(rngs_state)):
        return [make(mixer, rngs=rngs) for mixer in config.mixers]
    layers: list[Any] = []
    for mixer, group in itertools.groupby(config.mixers):
        graph: Any = None

        def init(rngs_state: Any, _: None, mixer: str = mixer) -> tuple[Any, nnx.State]:
            nonlocal graph
            rngs = nnx.merge(rngs_graph, rngs_state)
            graph, params = nnx.split(make(mixer, rngs=rngs))
            return nnx.state(rngs), params

        count = len(list(group))
        rngs_state, stacked = jax.lax.scan(init, rngs_state, length=count)
        for index in range(count):
            params = jax.tree.map(lambda x, i=index: jax.lax.index_in_dim(x, i, 0, False), stacked)
            layers.append(nnx.merge(graph, params))
    nnx.update(rngs, rngs_state)
    return layers


def check_mesh(config: ModelConfig, mesh: Mesh) -> None:
    """Raise `UserError` unless the mixers support the axes of `mesh` and it divides all parameters.

    Checks of the fields of a configuration, with better advice, are in `parallel.mesh.check_fits`.
    """
    for name in config.mixers:
        for axis, size in mesh.shape.items():
            if size > 1 and axis not in find_mixer(name).mesh_axes:
                raise UserError(
                    f"config.mesh.{axis}={size} is not supported by the mixer {name!r}; set it to 1"
                )
    for path, param in nnx.to_flat_state(abstract_model(config)[1]):
        spec = partition_spec(param.get_metadata("axes", LogicalAxes()), mesh)
        for size, axis in zip(param.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"config.mesh.{axis}={mesh.shape[axis]} does not divide {size}, a size of "
                    f"the parameter {'.'.join(map(str, path))}; change it"
                )


def check_ids(tokens: Tokens, vocab_size: int) -> None:
    """Raise ValueError for ids outside ``[0, vocab_size)``, unless traced; blocks until ready."""
    if isinstance(tokens, jax.core.Tracer) or not tokens.size:
        return
    if isinstance(tokens, jax.Array) and not tokens.is_fully_addressable:
        return
    ids = np.asarray(tokens)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"tokens: expected ids in [0, {vocab_size}); got {wrong}")


Initialized = tuple[nnx.GraphDef[LanguageModel], nnx.State]
"""Graphdef and parameters, for `nnx.merge`."""


def initialize(
    config: ModelConfig, key: jax.Array, *, remat: str = "none", stack_layers: bool = False
) -> Initialized:
    """Split ``LanguageModel(config, rngs=nnx.Rngs(key), ...)`` into graphdef and parameters.

    The result is the same, but a process traces each configuration only once, which takes 0.1 s
    for `configs/base.py`.

    Args:
      config, remat, stack_layers: see `LanguageModel`.
      key: PRNG key of the initial values.

    Raises:
      ValueError: as `LanguageModel`.
    """
    # A copy, since the cache keeps its arguments, and a configuration may change later. So may the
    # class of a mixer, in a notebook.
    mixers = tuple(find_mixer(name).make for name in config.mixers)
    return _initializer(dataclasses.replace(config), mixers, remat, stack_layers)(key)


def abstract_model(config: ModelConfig) -> Initialized:
    """Return graphdef and abstract parameters of a model."""
    abstract: Initialized = jax.eval_shape(lambda: initialize(config, jax.random.key(0)))
    return abstract


@functools.lru_cache(maxsize=32)
def _initializer(
    config: ModelConfig, mixers: tuple[MakeMixer, ...], remat: str, stack_layers: bool
) -> Callable[[jax.Array], Initialized]:
    def init(key: jax.Array) -> Initialized:
        model = LanguageModel(config, rngs=nnx.Rngs(key), remat=remat, stack_layers=stack_layers)
        return nnx.split(model, nnx.Param)

    return jax.jit(init)
