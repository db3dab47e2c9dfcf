"""Inputs, states and outputs of every mixer during a forward pass."""

from typing import Any, NamedTuple

import jax
from flax import nnx

from simplernn_jax.array_types import Activations, ModelState, RecurrentState, Tokens
from simplernn_jax.errors import UserError
from simplernn_jax.models import Attention, GatedLinearAttention, GLAState, LanguageModel, SimpleRNN

Recurrent = SimpleRNN | GatedLinearAttention
"""Mixers with the state of `gated_linear_recurrence`."""

Mixer = Recurrent | Attention


class Record(NamedTuple):
    """One call of one mixer."""

    inputs: Activations
    """``[B, T, D]``, in the compute dtype."""
    state: Any
    """Before the first token: a `RecurrentState`, a `GLAState`, or attention's `KVCache`."""
    output: Activations
    """``[B, T, D]``."""
    final_state: Any


def find_mixers(model: LanguageModel) -> list[Mixer]:
    """Return the mixer of every layer; raises `UserError` for one that cannot be decomposed."""
    mixers = [layer.mixer for layer in model.layers]
    for number, mixer in enumerate(mixers, 1):
        if not isinstance(mixer, Recurrent | Attention):
            raise UserError(
                f"layer {number} has the mixer {type(mixer).__name__}, which cannot be explained; "
                "use a model of simple_rnn, attention or gla"
            )
    return mixers


def recurrence_inputs(
    mixer: Recurrent, call: Record
) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
    """Return (q, k, v, log_gate) of a recorded call, and the output gate's pre-activation."""
    if isinstance(mixer, SimpleRNN):
        return mixer.cell.project(call.inputs)
    inputs, output_gate, _ = mixer.project(call.inputs, call.state.convolutions, None)
    return inputs, output_gate


def recurrent_state(state: RecurrentState | GLAState) -> RecurrentState:
    """Return the state of the recurrence of a mixer's state."""
    return state.recurrent if isinstance(state, GLAState) else state


def record(
    model: LanguageModel, tokens: Tokens, state: ModelState | None = None
) -> tuple[tuple[Record, ...], ModelState]:
    """Run a forward pass on `tokens` ``[B, T]``; return the call of every mixer and the new state.

    `model` is unchanged; without a `state` it starts from zero.
    """
    if state is None:
        state = model.initial_state(tokens.shape[0])
    model = nnx.merge(*nnx.split(model))  # a copy for the taps; arrays are shared
    taps = [_Tap(mixer) for mixer in find_mixers(model)]
    for layer, tap in zip(model.layers, taps, strict=True):
        layer.mixer = tap
    _, state = model.hidden_states(tokens, state)
    return tuple(tap.record for tap in taps), state


class _Tap:
    """Wrapper of a mixer that records the call."""

    record: Record

    def __init__(self, mixer: Mixer):
        self._mixer = mixer

    def mix(self, x: Activations, state: Any, segment_ids: None) -> tuple[Activations, Any]:
        y, final_state = self._mixer(x, state, segment_ids)
        self.record = Record(x, state, y, final_state)
        return y, final_state
