"""The two compiled programs of inference: reading a piece of prompt, writing a block of tokens.

Parameters are arguments, never constants of a program, and a program is compiled once per
architecture, batch size and (reading) piece length: see `programs_for`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from simplernn_jax.inference.sampling import sample
from simplernn_jax.inference.state import DecoderState
from simplernn_jax.models import LanguageModel

BLOCK_TOKENS = 32
"""Most tokens per row that one dispatch writes."""


class Settings(NamedTuple):
    """Traced settings of `write`; changing one does not recompile."""

    key: Key[Array, ""]
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    eos_id: Int[Array, ""]
    """-1: no token ends a row."""
    is_banned: Bool[Array, "vocab"]


class Programs(NamedTuple):
    """Jitted functions of one architecture; `parameters` is what `split` returned.

    read(parameters, state, tokens [B, T], is_reading [B]) -> state
        after the tokens of the rows that are reading; the other rows stay as they were.
    write(parameters, state, settings, num_tokens) -> (tokens [B, BLOCK_TOKENS], counts [B], state)
        `num_tokens` (traced) more tokens per row, fewer where EOS came; a row's first `counts`
        tokens count, EOS included.
    """

    read: Any
    write: Any


def split(model: LanguageModel) -> tuple[Programs, list[Array]]:
    """The model's arrays, and the programs that all models of its architecture share."""
    graphdef, arrays = nnx.split(model)
    parameters, treedef = jax.tree.flatten(arrays)
    return programs_for(graphdef, treedef), parameters


@functools.lru_cache(maxsize=16)
def programs_for(graphdef: Any, treedef: Any) -> Programs:
    """Programs of an architecture as `nnx.split` and `jax.tree.flatten` describe it.

    Cached here, because hashing a graph at every dispatch costs as much as a token.
    """

    def merge(parameters: list[Array]) -> LanguageModel:
        return nnx.merge(graphdef, jax.tree.unflatten(treedef, parameters))

    def read(
        parameters: list[Array],
        state: DecoderState,
        tokens: Int[Array, "B T"],
        is_reading: Bool[Array, "B"],
    ) -> DecoderState:
        model = merge(parameters)
        hidden, layers = model.encode(tokens, state.layers, None)
        logits = model.logits(hidden[:, -1:])[:, 0]
        return dataclasses.replace(
            state,
            layers=_where_rows(is_reading, layers, state.layers),
            logits=_where_rows(is_reading, logits, state.logits),
            finished=state.finished & ~is_reading,
        )

    def write(
        parameters: list[Array],
        state: DecoderState,
        settings: Settings,
        num_tokens: Int[Array, ""],
    ) -> tuple[Int[Array, "B block"], Int[Array, "B"], DecoderState]:
        model = merge(parameters)
        return _write(model, state, settings, num_tokens)

    return Programs(read=jax.jit(read), write=jax.jit(write))


def _write(
    model: LanguageModel, start: DecoderState, settings: Settings, num_tokens: Int[Array, ""]
) -> tuple[Int[Array, "B block"], Int[Array, "B"], DecoderState]:
    def goes_on(carry: tuple[Any, Any, DecoderState]) -> Bool[Array, ""]:
        step, _, state = carry
        return (step < num_tokens) & ~jnp.all(state.finished)

    def write_one(carry: tuple[Any, Any, DecoderState]) -> tuple[Any, Any, DecoderState]:
        step, block, state = carry
        token = _next_token(state, settings)
        block = lax.dynamic_update_index_in_dim(block, token, step, axis=1)
        finished = state.finished | (token == settings.eos_id)
        logits, layers = model(token[:, None], state.layers)
        state = dataclasses.replace(
            state,
            layers=model.rolled_back(finished, state.layers, layers),
            logits=_where_rows(finished, state.logits, logits[:, 0]),
            position=state.position + ~state.finished,
            finished=finished,
        )
        return step + 1, block, state

    block = jnp.zeros((start.position.shape[0], BLOCK_TOKENS), jnp.int32)
    start = dataclasses.replace(start, finished=start.finished & (settings.eos_id >= 0))
    _, block, end = lax.while_loop(goes_on, write_one, (jnp.int32(0), block, start))
    return block, end.position - start.position, end


def _next_token(state: DecoderState, settings: Settings) -> Int[Array, "B"]:
    def row_key(stream: Int[Array, ""], position: Int[Array, ""]) -> Key[Array, ""]:
        return jax.random.fold_in(jax.random.fold_in(settings.key, stream), position)

    return sample(
        jnp.where(settings.is_banned[None], -jnp.inf, state.logits),
        jax.vmap(row_key)(state.stream, state.position),
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
    )


def _where_rows(condition: Bool[Array, "B"], chosen: Any, other: Any) -> Any:
    """`chosen` in the rows where `condition` holds, `other` elsewhere, leaf by leaf."""

    def select(chosen: Array, other: Array) -> Array:
        return jnp.where(condition.reshape(-1, *[1] * (chosen.ndim - 1)), chosen, other)

    return jax.tree.map(select, chosen, other)
