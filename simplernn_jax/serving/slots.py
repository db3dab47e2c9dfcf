"""Device side of the server: N decoding slots, and prefill.

N is fixed for the life of the server, because XLA may order float32 sums differently for another
batch size. Within one N, a slot gives the same bits whatever its index and its neighbors. Where a
C function decodes the model, N changes no bit either.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from simplernn_jax.array_types import ModelState
from simplernn_jax.inference.programs import Architecture, next_logits
from simplernn_jax.inference.sampling import sample
from simplernn_jax.models import LanguageModel
from simplernn_jax.ops.decode import decode_tokens
from simplernn_jax.serving.jobs import Job, Sampling

MAX_BLOCK = 128
"""New tokens of a slot from one dispatch at most."""
TOP_LOGPROBS = 20
"""Alternatives reported for a token at most."""


class SlotSettings(NamedTuple):
    """Sampling settings, one per slot."""

    seed: UInt[Array, "N"]
    stream: Int[Array, "N"]
    """Number of the random stream of a seed: sequences that share a prompt get streams of their
    own."""
    temperature: Float[Array, "N"]
    top_k: Int[Array, "N"]
    top_p: Float[Array, "N"]
    min_p: Float[Array, "N"]
    repetition_penalty: Float[Array, "N"]
    presence_penalty: Float[Array, "N"]
    frequency_penalty: Float[Array, "N"]
    bias: Float[Array, "N vocab"]
    """Added to the logits; -inf bans an id."""
    is_stop: Bool[Array, "N vocab"]
    """Ids that end the sequence."""


class Slots(NamedTuple):
    """State of N sequences; every leaf begins with axis N."""

    layers: ModelState
    logits: Float[Array, "N vocab"]
    """float32 logits of the next token."""
    position: Int[Array, "N"]
    """New tokens so far; it numbers the draws of a sequence."""
    remaining: Int[Array, "N"]
    """New tokens still allowed; 0 once a stop id was generated."""
    in_prompt: Bool[Array, "N vocab"]
    counts: Int[Array, "N vocab"]
    """Occurrences among the new tokens, counted while `decode` applies penalties."""
    settings: SlotSettings


class TokenLogprobs(NamedTuple):
    """Log-probabilities of tokens under the model, before bias, penalties and temperature."""

    token: Float[Array, "... T"]
    top: Float[Array, "... T top"]
    """The largest, in descending order."""
    top_ids: Int[Array, "... T top"]


class Block(NamedTuple):
    """New tokens of all slots from one dispatch; the first `counts` of a slot are valid."""

    tokens: Int[Array, "N block"]
    counts: Int[Array, "N"]
    logprobs: TokenLogprobs


class SlotPrograms(NamedTuple):
    """Jitted functions of one architecture; `parameters` are those of `split_model`,
    `weights` those of `weights_for`.

    prefill(weights, (layers, ...), tokens [P, T], num_tokens [P])
        -> ((layers, logits [vocab], hidden [T, D]), ...)
        of P sequences, each with `layers` of batch size 1. Only where a C function decodes the
        model, `num_tokens` may be others than T; what the rest of `hidden` is means nothing.
    score(parameters, hidden [T, D], targets [T]) -> TokenLogprobs
    insert(slots, index [P], (layers, ...), (logits [vocab], ...), others) -> slots
        with P sequences at `index`, N being nowhere; each has `layers` of batch size 1, and
        `others` is a `Slots` of all P without layers and logits. Donates `slots`.
    decode(weights, slots, is_active [N], num_tokens, with_logprobs, with_penalties)
        -> (Block, slots)
        of up to `num_tokens` more tokens for each active slot; donates `slots`. The last three are
        traced: changing them does not recompile.
    """

    prefill: Any
    score: Any
    insert: Any
    decode: Any


def empty_slots(model: LanguageModel, num_slots: int) -> Slots:
    """Make slots without sequences."""
    vocab_size = model.config.vocab_size
    slot = new_slot(Job(np.zeros(0, np.int32), Sampling(), max_tokens=0), 0, vocab_size)
    slots: Slots = jax.tree.map(lambda x: jnp.stack([x] * num_slots), slot)
    logits = jnp.zeros((num_slots, vocab_size), jnp.float32)
    return slots._replace(layers=model.initial_state(num_slots), logits=logits)


def new_slot(job: Job, choice: int, vocab_size: int) -> Slots:
    """Make a slot of a choice of a job, without its axis and what the device has computed."""
    sampling = job.sampling
    is_stop, in_prompt = np.zeros((2, vocab_size), np.bool_)
    bias = np.zeros(vocab_size, np.float32)
    is_stop[list(sampling.stop_ids)] = True
    in_prompt[job.tokens] = True
    if job.recent is not None:
        in_prompt[job.recent] = True
    for number, value in sampling.logit_bias.items():
        bias[number] = value
    bias[list(sampling.banned_ids)] = -np.inf

    def one(value: Any, dtype: Any = np.float32) -> Any:
        return np.asarray(value, dtype)

    computed: Any = None
    return Slots(
        layers=computed,
        logits=computed,
        position=one(0, np.int32),
        remaining=one(job.max_tokens, np.int32),
        in_prompt=one(in_prompt, np.bool_),
        counts=one(np.zeros(vocab_size), np.int32),
        settings=SlotSettings(
            seed=one(sampling.seed, np.uint32),
            stream=one(job.first_stream + choice, np.int32),
            temperature=one(sampling.temperature),
            top_k=one(sampling.top_k, np.int32),
            top_p=one(sampling.top_p),
            min_p=one(sampling.min_p),
            repetition_penalty=one(sampling.repetition_penalty),
            presence_penalty=one(sampling.presence_penalty),
            frequency_penalty=one(sampling.frequency_penalty),
            bias=one(bias),
            is_stop=one(is_stop, np.bool_),
        ),
    )


@functools.lru_cache(maxsize=4)
def slot_programs(architecture: Architecture) -> SlotPrograms:
    """Make the programs of an architecture."""
    merge = architecture.merge

    def prefill(
        weights: Any,
        layers: tuple[ModelState, ...],
        tokens: Int[Array, "P T"],
        num_tokens: Int[Array, "P"],
    ) -> tuple[tuple[ModelState, Float[Array, "vocab"], Float[Array, "T D"]], ...]:
        together = jax.tree.map(lambda *parts: jnp.concatenate(parts), *layers)
        if architecture.decodes_natively:
            unused = jnp.zeros((len(layers), weights.head_bias.shape[0]))
            logits, hidden, together = decode_tokens(weights, tokens, num_tokens, unused, together)
        else:
            model = merge(weights)
            hidden, together = model.hidden_states(tokens, together)
            logits = model.logits(hidden[:, -1:])[:, 0]

        def one(index: int) -> tuple[ModelState, Float[Array, "vocab"], Float[Array, "T D"]]:
            state = jax.tree.map(lambda x: x[index : index + 1], together)
            return state, logits[index], hidden[index]

        return tuple(one(index) for index in range(len(layers)))

    def score(
        parameters: list[Array], hidden: Float[Array, "T D"], targets: Int[Array, "T"]
    ) -> TokenLogprobs:
        return token_logprobs(merge(parameters).logits(hidden[None])[0], targets)

    def insert(
        slots: Slots,
        index: Int[Array, "P"],
        layers: tuple[ModelState, ...],
        logits: tuple[Float[Array, "vocab"], ...],
        others: Slots,
    ) -> Slots:
        together = jax.tree.map(lambda *parts: jnp.concatenate(parts), *layers)
        new = others._replace(layers=together, logits=jnp.stack(logits))
        return jax.tree.map(lambda all, some: all.at[index].set(some, mode="drop"), slots, new)

    return SlotPrograms(
        prefill=jax.jit(prefill),
        score=jax.jit(score),
        insert=jax.jit(insert, donate_argnums=0),
        decode=jax.jit(functools.partial(_decode, architecture), donate_argnums=1),
    )


def token_logprobs(logits: Float[Array, "T vocab"], tokens: Int[Array, "T"]) -> TokenLogprobs:
    """Compute the log-probabilities of `tokens` and of the likeliest alternatives."""
    logprobs = lax.map(jax.nn.log_softmax, logits)  # rows alone: no bit depends on their number
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]
    top, top_ids = lax.top_k(logprobs, min(TOP_LOGPROBS, logits.shape[1]))
    return TokenLogprobs(chosen, top, top_ids)


def _decode(
    architecture: Architecture,
    weights: Any,
    start: Slots,
    is_active: Bool[Array, "N"],
    num_tokens: Int[Array, ""],
    with_logprobs: Bool[Array, ""],
    with_penalties: Bool[Array, ""],
) -> tuple[Block, Slots]:
    num_slots, vocab_size = start.logits.shape
    num_top = min(TOP_LOGPROBS, vocab_size)
    settings = start.settings
    keys = jax.vmap(lambda seed, stream: jax.random.fold_in(jax.random.key(seed), stream))(
        settings.seed, settings.stream
    )

    def is_unfinished(carry: tuple[Any, Block, Slots]) -> Bool[Array, ""]:
        step, _, slots = carry
        return (step < num_tokens) & jnp.any(is_active & (slots.remaining > 0))

    def decode_one(carry: tuple[Any, Block, Slots]) -> tuple[Any, Block, Slots]:
        step, block, slots = carry
        token = _next_token(slots, keys, with_penalties)
        logprobs = lax.cond(with_logprobs, token_logprobs, none_wanted, slots.logits, token)
        put = functools.partial(lax.dynamic_update_index_in_dim, index=step, axis=1)
        is_decoded = is_active & (slots.remaining > 0)
        new = is_decoded.astype(jnp.int32)
        is_last = jnp.take_along_axis(settings.is_stop, token[:, None], axis=1)[:, 0]
        logits, layers = next_logits(
            architecture, weights, token, is_decoded, slots.logits, slots.layers
        )
        slots = slots._replace(
            layers=layers,
            logits=logits,
            position=slots.position + new,
            remaining=jnp.where(is_decoded & is_last, 0, slots.remaining - new),
            counts=lax.cond(
                with_penalties, count, lambda counts, *_: counts, slots.counts, token, new
            ),
        )
        block = Block(
            put(block.tokens, token),
            block.counts + new,
            jax.tree.map(put, block.logprobs, logprobs),
        )
        return step + 1, block, slots

    def none_wanted(logits: jax.Array, token: jax.Array) -> TokenLogprobs:
        return jax.tree.map(jnp.zeros_like, jax.eval_shape(token_logprobs, logits, token))

    def count(counts: jax.Array, token: jax.Array, new: jax.Array) -> jax.Array:
        return counts.at[jnp.arange(num_slots), token].add(new, unique_indices=True)

    block = Block(
        tokens=jnp.zeros((num_slots, MAX_BLOCK), jnp.int32),
        counts=jnp.zeros(num_slots, jnp.int32),
        logprobs=TokenLogprobs(
            jnp.zeros((num_slots, MAX_BLOCK), jnp.float32),
            jnp.zeros((num_slots, MAX_BLOCK, num_top), jnp.float32),
            jnp.zeros((num_slots, MAX_BLOCK, num_top), jnp.int32),
        ),
    )
    _, block, end = lax.while_loop(is_unfinished, decode_one, (jnp.int32(0), block, start))
    return block, end


def _next_token(
    slots: Slots, keys: Key[Array, "N"], with_penalties: Bool[Array, ""]
) -> Int[Array, "N"]:
    settings = slots.settings
    logits = lax.cond(
        with_penalties,
        _penalized,
        lambda logits, *_: logits,
        slots.logits + settings.bias,
        slots.in_prompt,
        slots.counts,
        settings,
    )
    return sample(
        logits,
        jax.vmap(jax.random.fold_in)(keys, slots.position),
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
    )


def _penalized(
    logits: Float[Array, "N vocab"],
    in_prompt: Bool[Array, "N vocab"],
    counts: Int[Array, "N vocab"],
    settings: SlotSettings,
) -> Float[Array, "N vocab"]:
    """Apply the penalties: repetition to prompt and new tokens, the others to new tokens alone."""
    repetition = jnp.where(in_prompt | (counts > 0), settings.repetition_penalty[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits -= jnp.where(counts > 0, settings.presence_penalty[:, None], 0.0)
    return logits - settings.frequency_penalty[:, None] * counts.astype(jnp.float32)
