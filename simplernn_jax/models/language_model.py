"""Tokens and state in, logits and state out."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool

from simplernn_jax.array_types import Activations, Logits, ModelState, SegmentIds, Tokens
from simplernn_jax.config import ModelConfig
from simplernn_jax.models.attention import KVCache
from simplernn_jax.models.blocks import PlainBlock, ResidualBlock
from simplernn_jax.models.dense import dense, dtypes_of
from simplernn_jax.models.layer_stack import LayerStack
from simplernn_jax.models.remat import rematerialize
from simplernn_jax.ops.checks import FLOATING, INTEGER, check_array, check_batch, check_segment_ids
from simplernn_jax.ops.matmul import matmul
from simplernn_jax.ops.rms_norm import rms_norm
from simplernn_jax.sharding.collectives import axis_size, is_on_mesh, vary
from simplernn_jax.sharding.sequence_parallel import shard_segment_ids
from simplernn_jax.sharding.vocab_parallel import lookup, tied_logits


class LanguageModel(nnx.Module):
    """A stack of layers between an embedding and a head.

    ``block="plain"`` is the PyTorch project's model: embedding N(0, 1), layers without norm or
    residual, a head with bias. ``block="residual"`` trains deep: see `ResidualBlock`; the mixer of
    each layer is SimpleRNN or attention, and a final norm comes before the head, which may be the
    embedding itself.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Makes the parameters, all float32.

        Args:
          config: sizes and precision; see `ModelConfig`.
          rngs: source of initial values.
        """
        self.config = dataclasses.replace(config)
        parameters, dtype, _ = dtypes_of(config)
        self.dtype = dtype
        plain = config.block == "plain"
        scale = 1.0 if plain else config.hidden_dim**-0.5
        self.embedding = nnx.Embed(
            config.vocab_size,
            config.hidden_dim,
            dtype=jnp.promote_types(dtype, jnp.float32),
            param_dtype=parameters,
            embedding_init=nnx.initializers.normal(scale),
            rngs=rngs,
        )
        self.layers = nnx.List(
            [
                PlainBlock(config, rngs=rngs) if plain else ResidualBlock(config, mixer, rngs=rngs)
                for mixer in config.mixers
            ]
        )
        self.final_scale = None if plain else nnx.Param(jnp.ones(config.hidden_dim, parameters))
        tied = config.tie_embeddings and not plain
        init = {} if plain else {"kernel_init": nnx.initializers.normal(scale)}
        self.head = (
            None
            if tied
            else dense(config.hidden_dim, config.vocab_size, rngs=rngs, dtype=dtype, **init)
        )
        self.remat = "none"
        """What layers keep for the gradient; see `rematerialize`."""

    def stack_layers(self) -> None:
        """Makes all layers one, to be divided among the stages of a mesh; see `LayerStack`.

        Raises:
          UserError: the layers are not alike.
        """
        self.layers = LayerStack(self.layers)

    def initial_state(self, batch_size: int) -> ModelState:
        """The zero state: one entry per layer, or for all that are stacked; axis B first."""
        if isinstance(self.layers, LayerStack):
            return self.layers.initial_state(batch_size)
        return tuple(layer.initial_state(batch_size) for layer in self.layers)

    def rolled_back(
        self, where: Bool[Array, "B"], before: ModelState, after: ModelState
    ) -> ModelState:
        """Drop the last token of the sequences `where` from their states, without copying caches.

        Args:
          where: the sequences that keep the state they had.
          before: the states without the last token.
          after: the states with it.
        """

        def select(before: Any, after: Any) -> Any:
            if isinstance(after, KVCache):
                return after.rolled_back(where, before)
            return jnp.where(where.reshape(-1, *[1] * (after.ndim - 1)), before, after)

        return jax.tree.map(select, before, after, is_leaf=lambda x: isinstance(x, KVCache))

    def encode(
        self,
        tokens: Tokens,
        state: ModelState | None = None,
        segment_ids: SegmentIds | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Activations, ModelState]:
        """Tokens to what the head reads, ``[B, T, D]``; arguments as in `__call__`.

        On a mesh with an axis ``stage``: to this stage's share of it, ``[B, T / stages, D]``.
        """
        sizes = check_array("tokens", tokens, "B T", INTEGER)
        check_segment_ids(segment_ids, sizes)
        check_ids(tokens, self.config.vocab_size)
        if state is not None:
            self._check_state(state, sizes["B"])
        x = self._embed(tokens)
        if self.final_scale is not None:
            # Unit variance into the residual stream, whatever the scale that suits a tied head.
            x = x * self.config.hidden_dim**0.5
        if segment_ids is not None and axis_size("sequence") > 1:
            segment_ids = shard_segment_ids(segment_ids)
        x, state = self._through_layers(x, state, segment_ids, dropout_key)
        if self.final_scale is not None:
            x = rms_norm(x) * self.final_scale[...][None, None]
        return x, state

    def _check_state(self, state: ModelState, batch: int) -> None:
        """Layers and batch; the shapes of what each layer keeps it checks itself."""
        if not isinstance(self.layers, LayerStack):
            found = len(state) if isinstance(state, list | tuple) else type(state).__name__
            if found != len(self.layers):
                raise ValueError(
                    f"state: expected a tuple of {len(self.layers)} layers' states, as "
                    f"`initial_state` makes it; got {found}"
                )
        check_batch("state", state, batch)

    def _through_layers(
        self,
        x: Activations,
        state: ModelState | None,
        segment_ids: SegmentIds | None,
        dropout_key: jax.Array | None,
    ) -> tuple[Activations, ModelState]:
        if isinstance(self.layers, LayerStack):
            return self.layers(x, state, segment_ids, dropout_key, remat=self.remat)
        states = []
        for index, layer in enumerate(self.layers):
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            layer_state = None if state is None else state[index]
            x, layer_state = rematerialize(layer, self.remat)(x, layer_state, segment_ids, key)
            states.append(layer_state)
        return x, tuple(states)

    def _embed(self, tokens: Tokens) -> Activations:
        if is_on_mesh():
            return lookup(self.embedding.embedding[...], tokens)
        return self.embedding(tokens)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """What the head makes of ``[..., D]``: ``[..., vocab]``, float32.

        On a mesh with an axis ``tensor``: the logits of this device's part of the ids.

        Raises:
          ValueError: the last axis of `hidden` is not D.
          TypeError: `hidden` is not of floating point.
        """
        check_array("hidden", hidden, "... D", FLOATING, {"D": self.config.hidden_dim})
        hidden = vary(hidden, "tensor")
        if self.head is not None:
            return self.head(hidden)
        if is_on_mesh():
            return tied_logits(hidden, self.embedding.embedding[...], self.dtype)
        return matmul(hidden, self.embedding.embedding[...].T, self.dtype)

    def __call__(
        self,
        tokens: Tokens,
        state: ModelState | None = None,
        segment_ids: SegmentIds | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Logits, ModelState]:
        """Logits of the next token at every position, and the state after the last.

        Args:
          tokens: ``[B, T]`` integers in ``[0, vocab_size)``. Inside `jax.jit` ids cannot be
            checked: others give NaN there.
          state: what an earlier call returned, or None for zero.
          segment_ids: ``[B, T]``; a change of id clears the state exactly. `state` belongs to the
            first token's segment.
          dropout_key: draws the dropout; None drops nothing.

        Returns:
          ``[B, T, vocab]`` float32, and the state as in `initial_state`.

        Raises:
          ValueError: wrong ranks, shapes that do not fit together or the model, or, outside of
            `jax.jit`, ids that the vocabulary does not have.
          TypeError: wrong dtypes.
        """
        hidden, state = self.encode(tokens, state, segment_ids, dropout_key=dropout_key)
        return self.logits(hidden), state


def check_ids(tokens: Tokens, vocab_size: int) -> None:
    """Check that all ids are in ``[0, vocab_size)``, if they are known before the program runs.

    Raises:
      ValueError: one is not.
    """
    if isinstance(tokens, jax.core.Tracer) or not tokens.size:
        return
    if isinstance(tokens, jax.Array) and not tokens.is_fully_addressable:
        return
    ids = np.asarray(tokens)
    least, largest = int(ids.min()), int(ids.max())
    if least < 0 or largest >= vocab_size:
        wrong = least if least < 0 else largest
        raise ValueError(f"tokens: expected ids in [0, {vocab_size}); got {wrong}")
