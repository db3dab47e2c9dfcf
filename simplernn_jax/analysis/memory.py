"""Memory of the recurrences: half-lives of key channels, norm and rank of the state in a text."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
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


def half_gone(half_lives: np.ndarray) -> float:
    """Return the tokens n after which the channels' mean retention ``2^(-n / half_life)`` is 1/2.

    Infinite if at least half of the channels forget nothing.
    """
    lives = np.asarray(half_lives, np.float64).ravel()
    if np.mean(np.isinf(lives)) >= 0.5:
        return math.inf
    low, high = 0.0, 1.0
    while np.mean(np.exp2(-high / np.maximum(lives, 1e-9))) > 0.5:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        kept = np.mean(np.exp2(-middle / np.maximum(lives, 1e-9)))
        low, high = (middle, high) if kept > 0.5 else (low, middle)
    return high


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
    graph, params = nnx.split(model)

    @jax.jit
    def read(
        params: nnx.State, window: jax.Array, state: ModelState
    ) -> tuple[ModelState, list[tuple[jax.Array, jax.Array]]]:
        """Return the next state and, by recurrent layer, the summed -log g [H, K] and the state
        [H, K, V]."""
        model = nnx.merge(graph, params)
        recording = record(model, window, state)
        measured = []
        for mixer, call in zip(find_mixers(model), recording.layers, strict=True):
            if isinstance(mixer, Recurrent):
                (_, _, _, log_gate), _ = recurrence_inputs(mixer, call)
                state = recurrent_state(call.final_state)
                measured.append((-jnp.sum(log_gate, axis=(0, 1)), state[0]))
        return recording.state, measured

    step = min(-(-len(tokens) // _POINTS), _MAX_TOKENS)
    state = model.initial_state(1)
    positions, by_window = [], []
    logging.info("measuring the memory along the text ...")
    for start in range(0, len(tokens), step):
        window = np.asarray(tokens[start : start + step], np.int32)
        state, measured = read(params, window[None], state)
        positions.append(start + len(window))
        by_window.append([_reduce(*layer) for layer in measured])
        logging.log_every_n_seconds(
            logging.INFO, "measured %d of %d tokens", 10, positions[-1], len(tokens)
        )
    recurrent = zip(*by_window, strict=True)
    layers = [
        _layer_memory(next(recurrent), len(tokens)) if isinstance(mixer, Recurrent) else None
        for mixer in find_mixers(model)
    ]
    return Memory(np.asarray(positions), tuple(layers))


def _reduce(*measured: jax.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the summed decay [H, K], norm [H] and effective rank [H] of a layer in one window."""
    decay, state = (np.asarray(x, np.float64) for x in measured)
    return decay, np.linalg.norm(state, axis=(-2, -1)), effective_rank(state)


def _layer_memory(windows: Sequence[tuple[np.ndarray, ...]], num_tokens: int) -> LayerMemory:
    decays, norms, ranks = zip(*windows, strict=True)
    decay = np.sum(decays, axis=0) / num_tokens
    return LayerMemory(half_life(decay), np.stack(norms), np.stack(ranks))
