"""Memory that a configuration needs at least, against what the devices have.

Arithmetic on sizes, before anything is allocated or traced. Everything is a lower bound: only what
cannot fit is refused.
"""

import math
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from simplernn_jax.config import Config, ModelConfig
from simplernn_jax.devices import device_memory
from simplernn_jax.errors import UserError

_FLOAT32 = 4
_TOKEN_BYTES = 8
"""Of a batch: a token and its target, int32."""


_TRAINING_FIELDS = {
    "parameters": "--config.model sizes such as hidden_dim, mlp_dim or vocab_size",
    "activations": "--config.data.batch_size or sequence_length, or set "
    "--config.train.gradient_accumulation, backward_window or remat",
    "state": "--config.model.key_dim, value_dim, vocab_size or attention_context, or "
    "--config.data.batch_size",
}
"""What to lower."""


class Estimate(NamedTuple):
    """Bytes on one device."""

    parameters: float
    """With optimizer state."""
    activations: float
    """Or gradients, where they are more: one is freed while the other grows."""
    state: float
    """Of the recurrence and of attention, and logits."""


def check_training(config: Config, mesh: Mesh) -> float:
    """Check that the train step fits in the memory of the devices.

    Returns:
      The share of the memory that it needs at least.

    Raises:
      UserError: it cannot fit; says what is largest and what to lower.
    """
    estimate = of_training(config, dict(mesh.shape))
    return _check("this run", estimate, _TRAINING_FIELDS, mesh)


def check_program(num_bytes: float, mesh: Mesh) -> None:
    """Check that a compiled train step of `num_bytes` on each device fits.

    Raises:
      UserError: it does not.
    """
    memory = _memory(list(mesh.local_devices))
    if memory is not None and num_bytes > memory:
        raise UserError(
            f"a train step needs {_size(num_bytes)} of memory on each device, which has "
            f"{_size(memory)}; lower {_TRAINING_FIELDS['activations']}, or "
            f"{_TRAINING_FIELDS['parameters']}"
        )


def check_generation(model: ModelConfig, rows: int, max_new_tokens: int) -> None:
    """Check that generating `max_new_tokens` in each of `rows` sequences fits in memory.

    Raises:
      UserError: it cannot fit.
    """
    state = rows * (_state_of_row(model) + _FLOAT32 * (model.vocab_size + max_new_tokens))
    estimate = Estimate(_FLOAT32 * num_weights(model), 0, state)
    fields = {"parameters": "the model", "state": "--num_samples or --max_new_tokens"}
    _check("generating", estimate, fields)


def check_evaluation(model: ModelConfig, window: int) -> None:
    """Check that scoring `window` tokens at a time fits in memory.

    Raises:
      UserError: it cannot fit.
    """
    tokens = window * (_TOKEN_BYTES + _item(model) * _widest(model))
    estimate = Estimate(_FLOAT32 * num_weights(model), tokens, _state_of_row(model))
    fields = {"parameters": "the model", "activations": "--window", "state": "the model"}
    _check("scoring", estimate, fields)


def of_training(config: Config, sizes: dict[str, int]) -> Estimate:
    """Estimate a train step on one device of a mesh of `sizes`."""
    model, data, train = config.model, config.data, config.train
    weights = _FLOAT32 * num_weights(model) / (sizes["fsdp"] * sizes["tensor"] * sizes["stage"])
    moments = 2 if config.optimizer.name == "adamw" else 1
    device_rows = data.batch_size / (sizes["data"] * sizes["fsdp"])
    rows = device_rows / train.gradient_accumulation
    length = (train.backward_window or data.sequence_length) / sizes["sequence"]
    layers = model.num_layers / sizes["stage"]
    kept = float(model.hidden_dim)
    if train.remat == "none":
        mlp = 0 if model.block == "plain" else model.mlp_dim
        kept += (2 * model.key_dim + model.value_dim + mlp) / sizes["tensor"]
    widest = _widest(model) / (sizes["tensor"] * sizes["stage"])
    activations = rows * length * _item(model) * (layers * kept + widest)
    batch = device_rows * data.sequence_length * _TOKEN_BYTES
    state = rows * model.vocab_size * _FLOAT32 / (sizes["tensor"] * sizes["stage"])
    if data.mode == "stream":
        state += device_rows * _state_of_row(model) / (sizes["tensor"] * sizes["stage"])
    elif train.sample_every or data.validation_fraction:
        state = max(state, _state_of_row(model) / (sizes["tensor"] * sizes["stage"]))
    if "simple_rnn" in model.mixers:
        state = max(state, rows * _recurrent_state(model) / sizes["tensor"])
    return Estimate(weights * (1 + moments), max(weights, activations) + batch, state)


def num_weights(model: ModelConfig) -> int:
    """Count the elements of all matrices; the rest is less than one in a hundred of usual sizes."""
    width, keys, values = model.hidden_dim, model.key_dim, model.value_dim
    is_plain = model.block == "plain"
    untied = is_plain or not model.tie_embeddings
    total = model.vocab_size * width * (2 if untied else 1)
    for mixer in ("simple_rnn", "attention"):
        layer = (2 if mixer == "attention" else 3) * width * keys + 2 * width * values
        if not is_plain:
            layer += width * values + 2 * width * model.mlp_dim
        total += layer * model.mixers.count(mixer)
    return total


def _state_of_row(model: ModelConfig) -> int:
    """Bytes of the recurrent state and of cached keys and values of one sequence."""
    cached = model.attention_context * (model.key_dim + model.value_dim) * _item(model)
    count = model.mixers.count
    return count("simple_rnn") * _recurrent_state(model) + count("attention") * cached


def _recurrent_state(model: ModelConfig) -> int:
    """Bytes of one layer's state of one sequence."""
    item = 2 if model.state_precision == "bfloat16" else _FLOAT32
    return model.key_dim * model.value_dim // model.num_heads * item


def _widest(model: ModelConfig) -> int:
    """Channels of the largest activation of a layer."""
    mlp = 0 if model.block == "plain" else model.mlp_dim
    return max(model.hidden_dim, model.key_dim, model.value_dim, mlp)


def _item(model: ModelConfig) -> int:
    return 2 if model.precision == "bfloat16" else _FLOAT32


def _check(
    what: str, estimate: Estimate, fields: dict[str, str], mesh: Mesh | None = None
) -> float:
    devices = jax.local_devices()[:1] if mesh is None else list(mesh.local_devices)
    memory, needed = _memory(devices), sum(estimate)
    if memory is None or needed <= memory:
        return needed / memory if memory else 0.0
    largest = max(fields, key=lambda name: getattr(estimate, name))
    parts = ", ".join(f"{name} {_size(getattr(estimate, name))}" for name in fields)
    if devices[0].platform != "cpu":
        where = devices[0].device_kind
    else:
        where = "this machine" if len(devices) == 1 else f"each of {len(devices)} devices here"
    raise UserError(
        f"{what} needs at least {_size(needed)} of memory ({parts}), {where} has {_size(memory)}; "
        f"lower {fields[largest]}"
    )


def _memory(devices: list[jax.Device]) -> float | None:
    """Bytes for each of `devices`; None if they do not say."""
    memory = device_memory(devices[0])
    if memory is None:
        return None
    return memory / len(devices) if devices[0].platform == "cpu" else memory


def _size(num_bytes: float) -> str:
    """``4.8 TB``."""
    if num_bytes < 1:
        return "0 B"
    power = min(int(math.log10(num_bytes)) // 3, 6)
    return f"{num_bytes / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB', 'EB')[power]}"
