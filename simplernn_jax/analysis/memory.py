"""What a model remembers of a text, and what that is worth.

Half-lives of the key channels of recurrences, norm and rank of their states; and the loss with the
full context, and with less of it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplernn_jax.analysis.decomposition import (
    Recurrent,
    find_mixers,
    record,
    recurrence_inputs,
    recurrent_state,
)
from simplernn_jax.array_types import ModelState
from simplernn_jax.data.batches import Batch
from simplernn_jax.data.evaluation_batches import Contexts
from simplernn_jax.data.token_store import TokenSplit
from simplernn_jax.models import LanguageModel
from simplernn_jax.training.evaluate import Evaluator

_POINTS = 200
"""Number of measurements along a text, about."""

_MAX_TOKENS = 4096
"""Length of one call."""

SHORT_CONTEXT = 32
"""Tokens of the context that a full context is compared with."""

_MAX_GAINS = 1024
"""Number of tokens at the end of a text whose gain from a full context is measured."""


class LayerMemory(NamedTuple):
    """Memory of one recurrence in one text."""

    half_lives: np.ndarray
    """float64 [H, K], in tokens; infinite if nothing was forgotten."""
    norms: np.ndarray
    """float64 [P, H]: Frobenius norm of each head's state."""
    ranks: np.ndarray
    """float64 [P, H]: `effective_rank` of each head's state, at most min(K, V)."""


class Memory(NamedTuple):
    """Result of `measure_memory`."""

    positions: np.ndarray
    """int [P]: tokens before each measurement."""
    layers: tuple[LayerMemory | None, ...]
    """One per layer; None if its mixer is attention."""


def half_life(mean_decay: np.ndarray) -> np.ndarray:
    """Return ``ln 2 / E[-log g]``: tokens after which a key channel has decayed by half.

    Args:
      mean_decay: ``E[-log g]`` of each channel, of any shape.

    Returns:
      float64 of the same shape; infinite where nothing decays.
    """
    decay = np.asarray(mean_decay, np.float64)
    return np.divide(math.log(2), decay, out=np.full_like(decay, np.inf), where=decay > 0)


def effective_rank(matrices: np.ndarray) -> np.ndarray:
    """Return exp of the entropy of the singular values, as shares of their sum.

    Between 1 (one direction) and min(K, V) (all equal); 0 for a zero matrix.
    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality",
    EUSIPCO 2007, definition 1.

    Args:
      matrices: ``[..., K, V]``.

    Returns:
      float64 ``[...]``.
    """
    values = np.linalg.svd(np.asarray(matrices, np.float64), compute_uv=False)
    total = values.sum(axis=-1, keepdims=True)
    shares = np.divide(values, total, out=np.zeros_like(values), where=total > 0)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return np.where(total[..., 0] > 0, np.exp(-np.sum(shares * logs, axis=-1)), 0.0)


def measure_memory(model: LanguageModel, tokens: np.ndarray) -> Memory:
    """Measure the recurrences along [n] `tokens`, BOS included, from a zero state."""

    @nnx.jit
    def read(
        model: LanguageModel, window: jax.Array, state: ModelState
    ) -> tuple[ModelState, list[tuple[jax.Array, jax.Array] | None]]:
        """Return the next state and, by recurrent layer, the summed -log g [H, K] and the state
        [H, K, V]."""
        calls, state = record(model, window, state)
        measured: list[tuple[jax.Array, jax.Array] | None] = []
        for mixer, call in zip(find_mixers(model), calls, strict=True):
            if isinstance(mixer, Recurrent):
                (_, _, _, log_gate), _ = recurrence_inputs(mixer, call)
                final_state = recurrent_state(call.final_state)[0]
                measured.append((-jnp.sum(log_gate, axis=(0, 1)), final_state))
            else:
                measured.append(None)
        return state, measured

    def summarize(decay: jax.Array, state: jax.Array) -> tuple[np.ndarray, ...]:
        matrices = np.asarray(state, np.float64)
        norms = np.linalg.norm(matrices, axis=(-2, -1))
        return np.asarray(decay, np.float64), norms, effective_rank(matrices)

    step = min(-(-len(tokens) // _POINTS), _MAX_TOKENS)
    windows = [tokens[start : start + step] for start in range(0, len(tokens), step)]
    state, history = model.initial_state(1), []
    for window in windows:
        state, measured = read(model, np.asarray(window, np.int32)[None], state)
        history.append([arrays and summarize(*arrays) for arrays in measured])
    layers: list[LayerMemory | None] = []
    for by_window in zip(*history, strict=True):
        if by_window[0] is None:
            layers.append(None)
            continue
        decays, norms, ranks = map(np.stack, zip(*by_window, strict=True))
        layers.append(LayerMemory(half_life(decays.sum(axis=0) / len(tokens)), norms, ranks))
    return Memory(np.cumsum([len(window) for window in windows]), tuple(layers))


class PositionLoss(NamedTuple):
    """Mean loss by the number of tokens before in the document, in bins [1, 2), [2, 4) ..."""

    starts: np.ndarray
    """int [bins], lower bounds: tokens before the prediction, BOS included."""
    counts: np.ndarray
    """int [bins], predictions, at least 1."""
    carried: np.ndarray
    """float64 [bins], nats per token with the state carried across the whole document."""
    reset: np.ndarray
    """float64 [bins], with the state reset at a fixed interval."""


def loss_by_position(
    evaluator: Evaluator, params: nnx.State, split: TokenSplit, limit_tokens: int, reset_every: int
) -> PositionLoss:
    """Score the same predictions with the state carried and with it reset, by position.

    `limit_tokens` is the number of predictions, 0 for all; `reset_every` tokens lie between two
    resets. `params` belong to the evaluator's model.

    Raises:
      UserError: the split has nothing to predict.
    """
    totals = np.zeros((3, 64))  # count, carried, reset; positions are below 2**64
    before: np.ndarray | None = None
    pairs = zip(
        evaluator.scores(params, split, limit_tokens),
        evaluator.scores(params, split, limit_tokens, reset_every),
        strict=True,
    )
    for carried, reset in pairs:
        positions, before = _positions(carried.batch, before)
        is_real = carried.batch.loss_mask
        bins = np.log2(positions[is_real] + 1).astype(np.int64)
        nats, reset_nats = (np.asarray(x.nats, np.float64)[is_real] for x in (carried, reset))
        columns = np.ones_like(nats), nats, reset_nats
        totals += [np.bincount(bins, column, minlength=64) for column in columns]
    used = np.flatnonzero(totals[0])
    counts, carried_nats, reset_nats = totals[:, used]
    return PositionLoss(
        2**used, counts.astype(np.int64), carried_nats / counts, reset_nats / counts
    )


def _positions(batch: Batch, before: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return ``[B, T]``, tokens of the document before each input, and [B] for the next batch."""
    ids = batch.segment_ids
    begins = np.concatenate([batch.reset[:, None], ids[:, 1:] != ids[:, :-1]], axis=1)
    columns = np.arange(ids.shape[1])
    start = np.maximum.accumulate(np.where(begins, columns, -1), axis=1)
    carried = np.zeros(len(ids), np.int64) if before is None else before
    positions = np.where(start >= 0, columns - start, carried[:, None] + columns)
    return positions, positions[:, -1] + 1


def document_split(tokens: np.ndarray, num_bytes: int = 0) -> TokenSplit:
    """Create a split of one document: [n] ids, BOS included, and the bytes of its text."""
    return TokenSplit("text", np.asarray(tokens), np.zeros(1, np.int64), num_bytes, "")


def token_losses(
    evaluator: Evaluator, params: nnx.State, ids: np.ndarray, contexts: Contexts | None = None
) -> np.ndarray:
    """Return float64 [n - 1]: -log p of tokens 1 .. n - 1 of one document, given all before.

    With `contexts`, given those alone.
    """
    scores = evaluator.scores(params, document_split(ids), contexts=contexts)
    return np.concatenate([np.asarray(x.nats, np.float64)[x.batch.loss_mask] for x in scores])


def context_gains(
    evaluator: Evaluator, params: nnx.State, ids: np.ndarray, losses: np.ndarray
) -> np.ndarray:
    """Measure by how much context lowers the losses of a text's last tokens.

    `losses` are the `token_losses` of `ids`.

    Returns:
      float64: of each of the last tokens, the nats by which the tokens more than `SHORT_CONTEXT`
      before it lower its loss; empty if the text is too short.
    """
    count = min(_MAX_GAINS, len(ids) - SHORT_CONTEXT - 1)
    if count < 1:
        return np.zeros(0)
    end = ids[len(ids) - count - SHORT_CONTEXT :]
    short = token_losses(evaluator, params, end, Contexts(SHORT_CONTEXT, 1))
    return short[SHORT_CONTEXT - 1 :] - losses[-count:]
