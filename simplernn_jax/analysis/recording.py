"""What goes into and comes out of every recurrence of a model while it reads."""

from typing import Any, NamedTuple

import jax
from flax import nnx

from simplernn_jax.array_types import Activations, HeadState, ModelState, SegmentIds, Tokens
from simplernn_jax.models import LanguageModel, SimpleRNN


class Record(NamedTuple):
    """One call of one recurrence."""

    inputs: Activations
    """``[B, T, D]``, in the compute dtype."""
    state: HeadState
    """Before the first token."""
    output: Activations
    """``[B, T, D]``."""
    final_state: HeadState


class Recording(NamedTuple):
    """What `record` returns."""

    hidden: Activations
    """What the head reads, ``[B, T, D]``."""
    state: ModelState
    layers: tuple[Record | None, ...]
    """One per layer; None where its mixer is no `SimpleRNN`."""


def find_recurrences(model: LanguageModel) -> list[SimpleRNN | None]:
    """The recurrence of every layer, or None where it mixes tokens in another way."""
    names = [_name_of_recurrence(layer) for layer in model.layers]
    return [
        None if name is None else getattr(layer, name)
        for layer, name in zip(model.layers, names, strict=True)
    ]


def record(
    model: LanguageModel,
    tokens: Tokens,
    state: ModelState | None = None,
    segment_ids: SegmentIds | None = None,
    shift: jax.Array | None = None,
) -> Recording:
    """Reads `tokens` and keeps what every recurrence saw; `model` itself is left as it is.

    Args:
      model: the language model.
      tokens: ``[B, T]`` int32.
      state: before the first token; None is zero.
      segment_ids: as for `LanguageModel`.
      shift: ``[B, T, D]`` added to the embeddings, to take gradients with respect to them.
    """
    if state is None:
        state = model.initial_state(tokens.shape[0])
    model = nnx.merge(*nnx.split(model))  # a copy to put taps in; the arrays are shared
    taps: list[_Tap | None] = []
    for layer in model.layers:
        name = _name_of_recurrence(layer)
        taps.append(None if name is None else _Tap(getattr(layer, name)))
        if name is not None:
            setattr(layer, name, taps[-1])
    if shift is not None:
        model.embedding = _ShiftedEmbedding(model.embedding, shift)
    hidden, state = model.encode(tokens, state, segment_ids)
    return Recording(hidden, state, tuple(None if tap is None else tap.record for tap in taps))


def _name_of_recurrence(layer: nnx.Module) -> str | None:
    names = [name for name, child in vars(layer).items() if isinstance(child, SimpleRNN)]
    return names[0] if names else None


class _Tap:
    """Stands in for a recurrence and remembers the call."""

    def __init__(self, recurrence: SimpleRNN):
        self._recurrence = recurrence
        self.record: Record | None = None

    def __call__(
        self, x: Activations, state: HeadState, segment_ids: SegmentIds | None = None
    ) -> tuple[Activations, HeadState]:
        y, final_state = self._recurrence(x, state, segment_ids)
        self.record = Record(x, state, y, final_state)
        return y, final_state


class _ShiftedEmbedding:
    """An embedding whose results are shifted; as a tied head it is as before."""

    def __init__(self, embedding: nnx.Embed, shift: jax.Array):
        self._embedding = embedding
        self._shift = shift

    @property
    def embedding(self) -> Any:
        return self._embedding.embedding

    def __call__(self, tokens: Tokens) -> Activations:
        return self._embedding(tokens) + self._shift
