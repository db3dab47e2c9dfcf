"""What a model remembers of a text: half-lives of its key channels, and what its state is worth.

That is the loss with the full context, and with less of it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplernn_jax.analysis.decomposition import Recurrent, find_mixers, record, recurrence_inputs
from simplernn_jax.array_types import ModelState
from simplernn_jax.data.batches import Batch
from simplernn_jax.data.evaluation_batches import Contexts
from simplernn_jax.data.token_store import TokenSplit
from simplernn_jax.models import LanguageModel
from simplernn_jax.training.evaluate import Evaluator

_MAX_TOKENS = 4096
"""Length of one call."""

SHORT_CONTEXT = 32
"""Tokens of the context that a full context is compared with."""

_MAX_GAINS = 1024
"""Number of tokens at the end of a text whose gain from a full context is measured."""


def measure_half_lives(model: LanguageModel, tokens: np.ndarray) -> tuple[np.ndarray | None, ...]:
    """Measure after how many tokens the key channels decay by half, ``ln 2 / E[-log g]``.

    Args:
      model: the language model.
      tokens: [n] ids of a text, BOS included; it is read from a zero state.

    Returns:
      float64 [H, K] for every layer, infinite where nothing decays; None for attention.
    """

    @nnx.jit
    def read(
        model: LanguageModel, window: jax.Array, state: ModelState
    ) -> tuple[ModelState, list[jax.Array | None]]:
        """Return the next state and the summed -log g [H, K] of each recurrent layer."""
        calls, state = record(model, window, state)
        decays: list[jax.Array | None] = []
        for mixer, call in zip(find_mixers(model), calls, strict=True):
            is_recurrent = isinstance(mixer, Recurrent)
            log_gate = recurrence_inputs(mixer, call)[0][3] if is_recurrent else None
            decays.append(None if log_gate is None else -jnp.sum(log_gate, axis=(0, 1)))
        return state, decays

    state, history = model.initial_state(1), []
    for start in range(0, len(tokens), _MAX_TOKENS):
        window = np.asarray(tokens[start : start + _MAX_TOKENS], np.int32)
        state, decays = read(model, window[None], state)
        history.append(decays)

    def half_lives(*decays: jax.Array) -> np.ndarray:
        decay = np.sum(np.asarray(decays, np.float64), axis=0) / len(tokens)
        return np.divide(math.log(2), decay, out=np.full_like(decay, np.inf), where=decay > 0)

    return tuple(
        None if each[0] is None else half_lives(*each) for each in zip(*history, strict=True)
    )


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
