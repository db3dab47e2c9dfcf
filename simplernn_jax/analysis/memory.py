"""How long a model remembers, and how much of its state it uses along a text."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplernn_jax.analysis.progress import Report, begin_stage, no_report
from simplernn_jax.analysis.recording import find_mixers, record
from simplernn_jax.array_types import ModelState
from simplernn_jax.models import LanguageModel, SimpleRNN

_POINTS = 200
"""The state is looked at in about so many places of a text."""

_MOST_TOKENS = 4096
"""Read in one call."""


class LayerMemory(NamedTuple):
    """One recurrence along one text."""

    half_lives: np.ndarray
    """float64 [H, K], in tokens; infinite where nothing was forgotten."""
    norms: np.ndarray
    """float64 [P, H]: Frobenius norm of each head's state."""
    ranks: np.ndarray
    """float64 [P, H]: its `effective_rank`, at most min(K, V)."""


class Memory(NamedTuple):
    """What `measure_memory` returns."""

    positions: np.ndarray
    """int [P]: tokens read when the state was looked at."""
    layers: tuple[LayerMemory | None, ...]
    """One per layer; None where its mixer is attention."""


def half_life(mean_decay: np.ndarray) -> np.ndarray:
    """``ln 2 / E[-log g]``: tokens after which a key channel has forgotten half, on average."""
    decay = np.asarray(mean_decay, np.float64)
    return np.divide(math.log(2), decay, out=np.full_like(decay, np.inf), where=decay > 0)


def half_gone(half_lives: np.ndarray) -> float:
    """Tokens after which half of what all channels were given is gone: channel c keeps the share
    ``2^(-n / half_lives_c)`` after n tokens, and the mean over the channels is 1/2.

    Infinite where at least half of the channels forget nothing.
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
    """exp of the entropy of the singular values, each taken as a share of their sum.

    It lies between 1 (one direction) and min(K, V) (all equally), and is 0 for a zero matrix.
    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality",
    EUSIPCO 2007, definition 1.

    Args:
      matrices: ``[..., K, V]``.
    """
    values = np.linalg.svd(np.asarray(matrices, np.float64), compute_uv=False)
    total = values.sum(axis=-1, keepdims=True)
    shares = np.divide(values, total, out=np.zeros_like(values), where=total > 0)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return np.where(total[..., 0] > 0, np.exp(-np.sum(shares * logs, axis=-1)), 0.0)


def measure_memory(model: LanguageModel, tokens: np.ndarray, report: Report = no_report) -> Memory:
    """Reads a text from a zero state and looks at the recurrences on the way.

    Args:
      model: the language model.
      tokens: [n] ids, n at least 1, BOS included.
      report: takes lines about the progress.
    """
    graph, params = nnx.split(model)

    @jax.jit
    def read(
        params: nnx.State, piece: jax.Array, state: ModelState
    ) -> tuple[ModelState, list[tuple[jax.Array, jax.Array] | None]]:
        """The next state and, by layer, the summed -log g [H, K] and the state [H, K, V]."""
        model = nnx.merge(graph, params)
        recording = record(model, piece, state)
        measured: list[tuple[jax.Array, jax.Array] | None] = []
        for mixer, call in zip(find_mixers(model), recording.layers, strict=True):
            if isinstance(mixer, SimpleRNN):
                (_, _, _, log_gate), _ = mixer.cell.project(call.inputs)
                measured.append((-jnp.sum(log_gate, axis=(0, 1)), call.final_state[0]))
            else:
                measured.append(None)
        return recording.state, measured

    step = min(-(-len(tokens) // _POINTS), _MOST_TOKENS)
    state = model.initial_state(1)
    positions, by_piece = [], []
    advance = begin_stage(report, "looking at the memory along the text", len(tokens))
    for start in range(0, len(tokens), step):
        piece = np.asarray(tokens[start : start + step], np.int32)
        state, measured = read(params, piece[None], state)
        positions.append(start + len(piece))
        by_piece.append(_reduce(measured))
        advance(positions[-1])
    layers = [
        _layer_memory([piece[i] for piece in by_piece], len(tokens))
        if isinstance(mixer, SimpleRNN)
        else None
        for i, mixer in enumerate(find_mixers(model))
    ]
    return Memory(np.asarray(positions), tuple(layers))


def read_state(model: LanguageModel, tokens: np.ndarray) -> ModelState:
    """The state after [n] tokens of one text from a zero state, in bounded memory."""
    graph, params = nnx.split(model)

    @jax.jit
    def read(params: nnx.State, piece: jax.Array, state: ModelState) -> ModelState:
        return nnx.merge(graph, params).encode(piece, state)[1]

    state = model.initial_state(1)
    for start in range(0, len(tokens), _MOST_TOKENS):
        piece = np.asarray(tokens[start : start + _MOST_TOKENS], np.int32)
        state = read(params, piece[None], state)
    return state


_Piece = tuple[np.ndarray, np.ndarray, np.ndarray] | None


def _reduce(measured: list[tuple[jax.Array, jax.Array] | None]) -> list[_Piece]:
    """By layer: summed decay [H, K], norm [H] and effective rank [H] after one piece."""
    reduced: list[_Piece] = []
    for layer in measured:
        if layer is None:
            reduced.append(None)
            continue
        decay, state = (np.asarray(x, np.float64) for x in layer)
        norm = np.linalg.norm(state, axis=(-2, -1))
        reduced.append((decay, norm, effective_rank(state)))
    return reduced


def _layer_memory(pieces: list[_Piece], num_tokens: int) -> LayerMemory:
    decays, norms, ranks = zip(*(piece for piece in pieces if piece is not None), strict=True)
    return LayerMemory(half_life(sum(decays) / num_tokens), np.stack(norms), np.stack(ranks))
