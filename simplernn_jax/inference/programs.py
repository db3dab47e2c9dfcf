"""The two compiled programs of inference: prefill of a chunk of prompt, decoding of a block.

Parameters are arguments, never constants of a program, and a program is compiled once per
architecture, batch size and chunk length: see `programs_for`. They take the weights in another form
where a C function computes the model: see `decoder_weights`.
"""

import dataclasses
import functools
import weakref
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from simplernn_jax.array_types import ModelState
from simplernn_jax.errors import UserError
from simplernn_jax.inference.decoder_weights import decoder_weights, decodes_natively, weight_format
from simplernn_jax.inference.sampling import Settings, greedy, sample
from simplernn_jax.inference.state import DecoderState
from simplernn_jax.models import LanguageModel
from simplernn_jax.ops.decode import DecoderWeights, decode_tokens
from simplernn_jax.ops.segments import select_sequences

BLOCK_TOKENS = 32
"""Maximum number of tokens of a sequence that one dispatch decodes."""


class Programs(NamedTuple):
    """Jitted functions of one architecture; `parameters` are those of `split_model`,
    `weights` those of `weights_for`.

    prefill(weights, state, tokens [B, T], num_tokens [B]) -> state
        after the first `num_tokens` of each sequence: 0, which keeps its state, or T, or any number
        between where a C function decodes the model.
    decode(weights, state, settings, num_tokens) -> (tokens [B, BLOCK_TOKENS], counts [B], state)
        of `num_tokens` (traced) more tokens per sequence, fewer after EOS; the first `counts` of a
        sequence are valid, EOS included. Changing a setting does not recompile.
    """

    prefill: Any
    decode: Any


class Architecture(NamedTuple):
    """A model without its arrays; hashable."""

    graphdef: Any
    treedef: Any
    decodes_natively: bool
    """True if a C function decodes it."""

    def merge(self, parameters: list[Array]) -> LanguageModel:
        """Make a model with these arrays."""
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, parameters))


def split_model(model: LanguageModel) -> tuple[Architecture, list[Array]]:
    """Split a model into its architecture and its arrays; `UserError` if they have 16 bits."""
    graphdef, arrays = nnx.split(model)
    parameters, treedef = jax.tree.flatten(arrays)
    for x in parameters:
        if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4:
            raise UserError(f"model: has {x.dtype} parameters; convert them to float32")
    return Architecture(graphdef, treedef, decodes_natively(model)), parameters


class _Packed(NamedTuple):
    architecture: Architecture
    parameters: list[weakref.ref[Array]]
    weights: DecoderWeights


_packed: list[_Packed] = []
"""The newest packed weights, as long as the parameters exist."""


def weights_for(architecture: Architecture, parameters: list[Array]) -> Any:
    """Return the weights for `next_logits`: parameters, or those of the C function.

    The newest ones are kept for further calls with the same arrays.
    """
    if not architecture.decodes_natively:
        return parameters
    for kept in list(_packed):
        is_same = all(ref() is x for ref, x in zip(kept.parameters, parameters, strict=False))
        if is_same and kept.architecture == architecture:
            return kept.weights
    weights = _pack(architecture)(parameters)
    references = [weakref.ref(x, lambda _: _packed.clear()) for x in parameters]
    _packed[:] = [_Packed(architecture, references, weights)]
    return weights


@functools.lru_cache(maxsize=16)
def _pack(architecture: Architecture) -> Any:
    def pack(parameters: list[Array]) -> DecoderWeights:
        model = architecture.merge(parameters)
        return decoder_weights(model, weight_format(model))

    return jax.jit(pack)


def next_logits(
    architecture: Architecture,
    weights: Any,
    tokens: Int[Array, "B"],
    is_active: Bool[Array, "B"],
    logits: Float[Array, "B vocab"],
    layers: ModelState,
) -> tuple[Float[Array, "B vocab"], ModelState]:
    """Compute the logits and states after `tokens`; those of inactive sequences do not change."""
    if architecture.decodes_natively:
        num_tokens = is_active.astype(jnp.int32)
        logits, _, layers = decode_tokens(weights, tokens[:, None], num_tokens, logits, layers)
        return logits, layers
    model = architecture.merge(weights)
    new, new_layers = model(tokens[:, None], layers)
    new_layers = model.select_states(~is_active, layers, new_layers)
    return select_sequences(is_active, new[:, 0], logits), new_layers


@functools.lru_cache(maxsize=16)
def programs_for(architecture: Architecture) -> Programs:
    """Compile the programs of an architecture.

    Cached here, because hashing a graph at every dispatch takes as long as a token.
    """

    def prefill(
        weights: Any, state: DecoderState, tokens: Int[Array, "B T"], num_tokens: Int[Array, "B"]
    ) -> DecoderState:
        is_active = num_tokens > 0
        if architecture.decodes_natively:
            before = state.logits, state.layers
            logits, _, layers = decode_tokens(weights, tokens, num_tokens, *before)
        else:
            model = architecture.merge(weights)
            hidden, layers = model.hidden_states(tokens, state.layers)
            select = functools.partial(select_sequences, is_active)
            logits = select(model.logits(hidden[:, -1:])[:, 0], state.logits)
            layers = jax.tree.map(select, layers, state.layers)
        finished = state.finished & ~is_active
        return dataclasses.replace(state, layers=layers, logits=logits, finished=finished)

    decode = functools.partial(_decode, architecture)
    return Programs(prefill=jax.jit(prefill), decode=jax.jit(decode))


def _decode(
    architecture: Architecture,
    weights: Any,
    start: DecoderState,
    settings: Settings,
    num_tokens: Int[Array, ""],
) -> tuple[Int[Array, "B block"], Int[Array, "B"], DecoderState]:
    def is_unfinished(carry: tuple[Any, Any, DecoderState]) -> Bool[Array, ""]:
        step, _, state = carry
        return (step < num_tokens) & ~jnp.all(state.finished)

    def decode_one(carry: tuple[Any, Any, DecoderState]) -> tuple[Any, Any, DecoderState]:
        step, block, state = carry
        token = _next_token(state, settings)
        block = lax.dynamic_update_index_in_dim(block, token, step, axis=1)
        finished = state.finished | (token == settings.eos_id)
        logits, layers = next_logits(
            architecture, weights, token, ~finished, state.logits, state.layers
        )
        state = dataclasses.replace(
            state,
            layers=layers,
            logits=logits,
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

    def draw(logits: Float[Array, "B vocab"]) -> Int[Array, "B"]:
        return sample(
            logits,
            jax.vmap(key_of)(state.stream, state.position),
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
        )

    logits = jnp.where(settings.is_banned[None], -jnp.inf, state.logits)
    return lax.cond(settings.temperature > 0, draw, greedy, logits)  # greedy needs no keys
