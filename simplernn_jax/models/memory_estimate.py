"""Lower bounds on the memory that a configuration needs, checked against the devices.

From shapes alone, before anything is allocated or compiled; only what cannot fit is rejected.
"""

import dataclasses
import functools
from collections import Counter
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from simplernn_jax.config import Config, ModelConfig
from simplernn_jax.devices import device_memory
from simplernn_jax.errors import UserError, format_bytes
from simplernn_jax.models.language_model import LanguageModel, initialize

_FLOAT32 = 4
_TOKEN_BYTES = 8
"""A token and its target, int32."""
_EVALUATION_STATE_BYTES = 1 << 28
"""Bound on the states of sequences that are scored together, if one alone is not larger."""
_TRAINING_FIELDS = {
    "parameters": "config.model sizes such as hidden_dim, mlp_dim or vocab_size",
    "activations": "config.data.batch_size or sequence_length, or set "
    "config.train.gradient_accumulation, bptt_window or remat",
    "state": "config.model.key_dim, value_dim, vocab_size or mixer_options, or "
    "config.data.batch_size",
}
"""Fields to lower, by the part of an `Estimate` that is largest."""


class Estimate(NamedTuple):
    """Bytes on one device."""

    parameters: float
    """Parameters and optimizer state."""
    activations: float
    """The larger of activations and gradients: one is freed while the other grows."""
    state: float
    """Recurrent state, KV cache and logits."""


def check_training(config: Config, mesh: Mesh) -> float:
    """Check that the train step fits in the memory of the devices.

    Returns:
      The fraction of the memory that it needs, a lower bound.

    Raises:
      UserError: it cannot fit; names the largest part and the fields to lower.
    """
    estimate = estimate_training(config, dict(mesh.shape))
    return _check("this run", estimate, _TRAINING_FIELDS, mesh)


def check_program(num_bytes: int, mesh: Mesh) -> None:
    """Raise `UserError` if a train step of `num_bytes` on each device does not fit in memory."""
    memory = _memory_per_device(list(mesh.local_devices))
    if memory is not None and num_bytes > memory:
        raise UserError(
            f"a train step needs {format_bytes(num_bytes)} of memory on each device, which has "
            f"{format_bytes(memory)}; lower {_TRAINING_FIELDS['activations']}, or "
            f"{_TRAINING_FIELDS['parameters']}"
        )


def check_generation(model: LanguageModel, batch_size: int, max_new_tokens: int) -> None:
    """Raise `UserError` if `max_new_tokens` of `batch_size` sequences cannot fit in memory."""
    parameters, state = _bytes_of(model)
    state = batch_size * (state + _FLOAT32 * (model.config.vocab_size + max_new_tokens))
    fields = {"parameters": "the model", "state": "--num_samples or --max_new_tokens"}
    _check("generating", Estimate(parameters, 0, state), fields)


def check_evaluation(model: LanguageModel, window: int) -> None:
    """Raise `UserError` if scoring `window` tokens at a time cannot fit in memory."""
    parameters, state = _bytes_of(model)
    tokens = window * (_TOKEN_BYTES + _item_bytes(model.config) * _widest(model.config))
    fields = {"parameters": "the model", "activations": "--window", "state": "the model"}
    _check("scoring", Estimate(parameters, tokens, state), fields)


def _bytes_of(model: LanguageModel) -> tuple[int, int]:
    """Return the bytes of the parameters, and of the state of one sequence."""
    state = jax.eval_shape(lambda: model.initial_state(1))
    return _num_bytes(nnx.state(model, nnx.Param)), _num_bytes(state)


def estimate_training(config: Config, sizes: dict[str, int]) -> Estimate:
    """Estimate a train step on one device of a mesh of `sizes`; no automatic microbatches."""
    model, data, train = config.model, config.data, config.train
    parameters, state_bytes = model_bytes(model)
    weights = parameters / (sizes["fsdp"] * sizes["tensor"] * sizes["pipeline"])
    moments = 2 if config.optimizer.name == "adamw" else 1
    device_sequences = data.batch_size / (sizes["data"] * sizes["fsdp"])
    sequences = device_sequences / (train.gradient_accumulation or 1)
    length = (train.bptt_window or data.sequence_length) / sizes["sequence"]
    # Stages save the inputs of their chunks alone.
    layers = model.num_layers if sizes["pipeline"] == 1 else 1
    saved = float(model.hidden_dim)
    if train.remat == "none" and sizes["pipeline"] == 1:
        mlp = {"plain": 0, "residual": 1, "swiglu": 2}[model.block] * model.mlp_dim
        saved += mlp / sizes["tensor"]
    widest = _widest(model) / (sizes["tensor"] * sizes["pipeline"])
    activations = sequences * length * _item_bytes(model) * (layers * saved + widest)
    batch = device_sequences * data.sequence_length * _TOKEN_BYTES
    shards = sizes["tensor"] * sizes["pipeline"]
    state = sequences * model.vocab_size * _FLOAT32 / shards
    if data.mode == "stream":
        state += device_sequences * state_bytes / shards
    elif train.sample_every:
        state = max(state, state_bytes / shards)
    if data.validation_fraction:  # the states before and after a batch, of one sequence at least
        state = max(state, 2 * state_bytes / shards)
    if {*model.mixers} <= {"simple_rnn", "gla"}:  # at least the states of a layer
        state = max(state, sequences * state_bytes / model.num_layers / sizes["tensor"])
    return Estimate(weights * (1 + moments), max(weights, activations) + batch, state)


def evaluation_sequences(model: ModelConfig, most: int) -> int:
    """Return how many sequences are scored together: at most `most`, and with bounded states."""
    return max(1, min(most, int(_EVALUATION_STATE_BYTES / max(1, model_bytes(model)[1]))))


@functools.lru_cache(maxsize=32)
def model_bytes(model: ModelConfig) -> tuple[float, float]:
    """Return the bytes of all parameters, and of the state of one sequence.

    Of models of one and two layers, since tracing takes time for every layer, whatever their sizes.
    """

    def trace(mixer: str, layers: int) -> np.ndarray:
        def build() -> tuple[Any, Any]:
            graph, params = initialize(few, jax.random.key(0))
            return params, nnx.merge(graph, params).initial_state(1)

        few = dataclasses.replace(model, num_layers=layers, mixer=mixer)
        return np.array([_num_bytes(tree) for tree in jax.eval_shape(build)], float)

    total = np.zeros(2)
    for mixer, count in Counter(model.mixers).items():
        one, two = (trace(mixer, layers) for layers in (1, 2))
        total += count * (two - one)
    parameters, state = total + one - (two - one)  # with what is not of a layer
    return float(parameters), float(state)


def _num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _widest(model: ModelConfig) -> int:
    """Return a lower bound on the channels of a layer's largest activation."""
    return max(model.hidden_dim, 0 if model.block == "plain" else model.mlp_dim)


def _item_bytes(model: ModelConfig) -> int:
    return 2 if model.precision == "bfloat16" else _FLOAT32


def _check(
    task: str, estimate: Estimate, fields: dict[str, str], mesh: Mesh | None = None
) -> float:
    devices = jax.local_devices()[:1] if mesh is None else list(mesh.local_devices)
    memory, needed = _memory_per_device(devices), sum(estimate)
    if memory is None or needed <= memory:
        return needed / memory if memory else 0.0
    largest = max(fields, key=lambda name: getattr(estimate, name))
    parts = ", ".join(f"{name} {format_bytes(getattr(estimate, name))}" for name in fields)
    if devices[0].platform != "cpu":
        where = devices[0].device_kind
    else:
        where = "this machine" if len(devices) == 1 else f"each of {len(devices)} devices"
    raise UserError(
        f"{task} needs at least {format_bytes(needed)} of memory ({parts}), {where} has "
        f"{format_bytes(memory)}; lower {fields[largest]}"
    )


def _memory_per_device(devices: list[jax.Device]) -> float | None:
    """Return the bytes available to each of `devices`; None if unknown."""
    memory = device_memory(devices[0])
    if memory is None:
        return None
    return memory / len(devices) if devices[0].platform == "cpu" else memory
