"""Lower bounds on the memory that a configuration needs, checked against the devices.

Arithmetic on sizes, before anything is allocated or traced; only what cannot fit is rejected.
"""

from typing import NamedTuple

import jax
from jax.sharding import Mesh

from simplernn_jax.config import GATE_RANK, Config, ModelConfig
from simplernn_jax.devices import device_memory
from simplernn_jax.errors import UserError, format_bytes

_FLOAT32 = 4
_TOKEN_BYTES = 8
"""A token and its target, int32."""
_EVALUATION_STATE_BYTES = 1 << 28
"""Bound on the states of sequences that are scored together, if one alone is not larger."""
_TRAINING_FIELDS = {
    "parameters": "--config.model sizes such as hidden_dim, mlp_dim or vocab_size",
    "activations": "--config.data.batch_size or sequence_length, or set "
    "--config.train.gradient_accumulation, bptt_window or remat",
    "state": "--config.model.key_dim, value_dim, vocab_size or attention_context, or "
    "--config.data.batch_size",
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


def check_program(num_bytes: float, mesh: Mesh) -> None:
    """Raise `UserError` if a train step of `num_bytes` on each device does not fit in memory."""
    memory = _memory_per_device(list(mesh.local_devices))
    if memory is not None and num_bytes > memory:
        raise UserError(
            f"a train step needs {format_bytes(num_bytes)} of memory on each device, which has "
            f"{format_bytes(memory)}; lower {_TRAINING_FIELDS['activations']}, or "
            f"{_TRAINING_FIELDS['parameters']}"
        )


def check_generation(model: ModelConfig, batch_size: int, max_new_tokens: int) -> None:
    """Raise `UserError` if `max_new_tokens` of `batch_size` sequences cannot fit in memory."""
    state = batch_size * (_state_bytes(model) + _FLOAT32 * (model.vocab_size + max_new_tokens))
    estimate = Estimate(_FLOAT32 * num_weights(model), 0, state)
    fields = {"parameters": "the model", "state": "--num_samples or --max_new_tokens"}
    _check("generating", estimate, fields)


def check_evaluation(model: ModelConfig, window: int) -> None:
    """Raise `UserError` if scoring `window` tokens at a time cannot fit in memory."""
    tokens = window * (_TOKEN_BYTES + _item_bytes(model) * _widest(model))
    estimate = Estimate(_FLOAT32 * num_weights(model), tokens, _state_bytes(model))
    fields = {"parameters": "the model", "activations": "--window", "state": "the model"}
    _check("scoring", estimate, fields)


def estimate_training(config: Config, sizes: dict[str, int]) -> Estimate:
    """Estimate a train step on one device of a mesh of `sizes`; no automatic microbatches."""
    model, data, train = config.model, config.data, config.train
    weights = _FLOAT32 * num_weights(model) / (sizes["fsdp"] * sizes["tensor"] * sizes["pipeline"])
    moments = 2 if config.optimizer.name == "adamw" else 1
    device_sequences = data.batch_size / (sizes["data"] * sizes["fsdp"])
    sequences = device_sequences / (train.gradient_accumulation or 1)
    length = (train.bptt_window or data.sequence_length) / sizes["sequence"]
    # Stages save the inputs of their chunks alone.
    layers = model.num_layers if sizes["pipeline"] == 1 else 1
    saved = float(model.hidden_dim)
    if train.remat == "none" and sizes["pipeline"] == 1:
        mlp = {"plain": 0, "residual": 1, "gla": 2}[model.block] * model.mlp_dim
        saved += (2 * model.key_dim + model.value_dim + mlp) / sizes["tensor"]
    widest = _widest(model) / (sizes["tensor"] * sizes["pipeline"])
    activations = sequences * length * _item_bytes(model) * (layers * saved + widest)
    batch = device_sequences * data.sequence_length * _TOKEN_BYTES
    state = sequences * model.vocab_size * _FLOAT32 / (sizes["tensor"] * sizes["pipeline"])
    if data.mode == "stream":
        state += device_sequences * _state_bytes(model) / (sizes["tensor"] * sizes["pipeline"])
    elif train.sample_every:
        state = max(state, _state_bytes(model) / (sizes["tensor"] * sizes["pipeline"]))
    if data.validation_fraction:  # the states before and after a batch, of one sequence at least
        state = max(state, 2 * _state_bytes(model) / (sizes["tensor"] * sizes["pipeline"]))
    if "simple_rnn" in model.mixers:
        state = max(state, sequences * _recurrent_state_bytes(model) / sizes["tensor"])
    return Estimate(weights * (1 + moments), max(weights, activations) + batch, state)


def evaluation_sequences(model: ModelConfig, most: int) -> int:
    """Return how many sequences are scored together: at most `most`, and with bounded states."""
    return max(1, min(most, _EVALUATION_STATE_BYTES // max(1, _state_bytes(model))))


def num_weights(model: ModelConfig) -> int:
    """Return the number of weights of all matrices: at usual sizes 99 % of the parameters."""
    width, keys, values = model.hidden_dim, model.key_dim, model.value_dim
    is_plain = model.block == "plain"
    untied = is_plain or not model.tie_embeddings
    total = model.vocab_size * width * (2 if untied else 1)
    for mixer in ("simple_rnn", "attention"):
        layer = (2 if mixer == "attention" else 3) * width * keys + 2 * width * values
        if model.block == "gla":
            layer += GATE_RANK * (width + keys) - width * keys  # a low-rank gate
        if not is_plain:
            matrices = 3 if model.block == "gla" else 2
            layer += width * values + matrices * width * model.mlp_dim
        total += layer * model.mixers.count(mixer)
    return total


def _state_bytes(model: ModelConfig) -> int:
    """Return the bytes of recurrent state and KV cache of one sequence."""
    cached = model.attention_context * (model.key_dim + model.value_dim) * _item_bytes(model)
    count = model.mixers.count
    return count("simple_rnn") * _recurrent_state_bytes(model) + count("attention") * cached


def _recurrent_state_bytes(model: ModelConfig) -> int:
    """Return the bytes of one layer's recurrent state of one sequence."""
    item = 2 if model.state_precision == "bfloat16" else _FLOAT32
    return model.key_dim * model.value_dim // model.num_heads * item


def _widest(model: ModelConfig) -> int:
    """Return the number of channels of a layer's largest activation."""
    mlp = 0 if model.block == "plain" else model.mlp_dim
    return max(model.hidden_dim, model.key_dim, model.value_dim, mlp)


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
