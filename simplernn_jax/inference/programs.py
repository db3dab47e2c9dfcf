"""The two compiled programs of inference: prefill of a chunk of prompt, decoding of a block.

Parameters are arguments, never constants of a program, and a program is compiled once per
architecture, batch size and chunk length: see `programs_for`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Int, Key

from simplernn_jax.inference.sampling import Settings, sample
from simplernn_jax.inference.state import DecoderState
from simplernn_jax.models import LanguageModel
from simplernn_jax.ops.reset_state import select_sequences

BLOCK_TOKENS = 32
"""Tokens of a sequence that one dispatch decodes at most."""


class Programs(NamedTuple):
    """Jitted functions of one architecture; `parameters` are those of `split_model`.

    prefill(parameters, state, tokens [B, T], is_active [B]) -> state
        after the tokens of the active sequences; the others keep their state.
    decode(parameters, state, settings, num_tokens) -> (tokens [B, BLOCK_TOKENS], counts [B], state)
        of `num_tokens` (traced) more tokens per sequence, fewer after EOS; the first `counts` of a
        sequence are valid, EOS included. Changing a setting does not recompile.
    """

    prefill: Any
    decode: Any


class Architecture(NamedTuple):
    """A model without its arrays; hashable."""

    graphdef: Any
    treedef: Any

    def merge(self, parameters: list[Array]) -> LanguageModel:
        """Make a model with these arrays."""
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, parameters))


def split_model(model: LanguageModel) -> tuple[Architecture, list[Array]]:
    """Split a model into its architecture and its arrays."""
    graphdef, arrays = nnx.split(model)
    parameters, treedef = jax.tree.flatten(arrays)
    return Architecture(graphdef, treedef), parameters


@functools.lru_cache(maxsize=16)
def programs_for(architecture: Architecture) -> Programs:
    """Compile the programs of an architecture.

    Cached here, because hashing a graph at every dispatch takes as long as a token.
    """

    def prefill(
        parameters: list[Array],
        state: DecoderState,
        tokens: Int[Array, "B T"],
        is_active: Bool[Array, "B"],
    ) -> DecoderState:
        model = architecture.merge(parameters)
        hidden, layers = model.hidden_states(tokens, state.layers, None)
        logits = model.logits(hidden[:, -1:])[:, 0]
        return dataclasses.replace(
            state,
            layers=_select(is_active, layers, state.layers),
            logits=_select(is_active, logits, state.logits),
            finished=state.finished & ~is_active,
        )

    def decode(
        parameters: list[Array], state: DecoderState, settings: Settings, num_tokens: Int[Array, ""]
    ) -> tuple[Int[Array, "B block"], Int[Array, "B"], DecoderState]:
        return _decode(architecture.merge(parameters), state, settings, num_tokens)

    return Programs(prefill=jax.jit(prefill), decode=jax.jit(decode))


def _decode(
    model: LanguageModel, start: DecoderState, settings: Settings, num_tokens: Int[Array, ""]
) -> tuple[Int[Array, "B block"], Int[Array, "B"], DecoderState]:
    def is_unfinished(carry: tuple[Any, Any, DecoderState]) -> Bool[Array, ""]:
        step, _, state = carry
        return (step < num_tokens) & ~jnp.all(state.finished)

    def decode_one(carry: tuple[Any, Any, DecoderState]) -> tuple[Any, Any, DecoderState]:
        step, block, state = carry
        token = _next_token(state, settings)
        block = lax.dynamic_update_index_in_dim(block, token, step, axis=1)
        finished = state.finished | (token == settings.eos_id)
        logits, layers = model(token[:, None], state.layers)
        state = dataclasses.replace(
            state,
            layers=model.select_states(finished, state.layers, layers),
            logits=_select(finished, state.logits, logits[:, 0]),
            position=state.position + (~state.finished).astype(jnp.int32),
            finished=finished,
        )
        return step + 1, block, state

    block = jnp.zeros((start.position.shape[0], BLOCK_TOKENS), jnp.int32)
    start = dataclasses.replace(start, finished=start.finished & (settings.eos_id >= 0))
    _, block, end = lax.while_loop(is_unfinished, decode_one, (jnp.int32(0), block, start))
    return block, end.position - start.position, end


def _next_token(state: DecoderState, settings: Settings) -> Int[Array, "B"]:
    def key_of(stream: Int[Array, ""], position: Int[Array, ""]) -> Key[Array, ""]:
        return jax.random.fold_in(jax.random.fold_in(settings.key, stream), position)

    return sample(
        jnp.where(settings.is_banned[None], -jnp.inf, state.logits),
        jax.vmap(key_of)(state.stream, state.position),
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
    )


def _select(condition: Bool[Array, "B"], chosen: Any, other: Any) -> Any:
    """Select `chosen` for the sequences where `condition` holds, else `other`, leaf by leaf."""
    return jax.tree.map(functools.partial(select_sequences, condition), chosen, other)
