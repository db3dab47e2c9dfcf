"""Memory of the recurrences: half-lives of key channels, norm and rank of the state in a text."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplernn_jax.analysis.recording import (
    Recurrent,
    find_mixers,
    record,
    recurrence_inputs,
    recurrent_state,
)
from simplernn_jax.array_types import ModelState
from simplernn_jax.models import LanguageModel

_POINTS = 200
"""Number of measurements along a text, about."""

_MAX_TOKENS = 4096
"""Length of one call."""


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
    mixers = find_mixers(model)

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

    step = min(-(-len(tokens) // _POINTS), _MAX_TOKENS)
    state = model.initial_state(1)
    positions = []
    decays: list[list[np.ndarray]] = [[] for _ in mixers]
    norms: list[list[np.ndarray]] = [[] for _ in mixers]
    ranks: list[list[np.ndarray]] = [[] for _ in mixers]
    for start in range(0, len(tokens), step):
        window = np.asarray(tokens[start : start + step], np.int32)
        state, measured = read(model, window[None], state)
        positions.append(start + len(window))
        for layer, arrays in enumerate(measured):
            if arrays is not None:
                decay, matrices = (np.asarray(x, np.float64) for x in arrays)
                decays[layer].append(decay)
                norms[layer].append(np.linalg.norm(matrices, axis=(-2, -1)))
                ranks[layer].append(effective_rank(matrices))
    layers = [
        LayerMemory(half_life(np.sum(decay, axis=0) / len(tokens)), np.stack(norm), np.stack(rank))
        if decay
        else None
        for decay, norm, rank in zip(decays, norms, ranks, strict=True)
    ]
    return Memory(np.asarray(positions), tuple(layers))
