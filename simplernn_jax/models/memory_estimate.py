"""Lower bounds on the memory that a configuration needs, checked against the devices.

From shapes alone, before anything is allocated or compiled; only what cannot fit is rejected.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from simplernn_jax.config import Config, ModelConfig
from simplernn_jax.devices import device_memory
from simplernn_jax.errors import UserError, format_bytes
from simplernn_jax.models.language_model import LanguageModel, abstract_model

_FLOAT32 = 4
_TOKEN_BYTES = 8
"""A token and its target, int32."""
_EVALUATION_STATE_BYTES = 1 << 28
"""Bound on the states of sequences that are scored together, if one alone is not larger."""
_TRAINING_ADVICE = (
    "lower config.data.batch_size or sequence_length, sizes of config.model, or set "
    "config.train.gradient_accumulation, bptt_window or remat"
)

Estimate = Mapping[str, float]
"""Bytes on one device by their use."""


def check_training(config: Config, mesh: Mesh) -> float:
    """Check that the train step fits in the memory of the devices.

    Returns:
      The fraction of the memory that it needs, a lower bound.

    Raises:
      UserError: it cannot fit; names what needs the memory and the fields to lower.
    """
    estimate = estimate_training(config, dict(mesh.shape))
    return _check("this run", estimate, _TRAINING_ADVICE, mesh.local_devices)


def check_program(num_bytes: int, mesh: Mesh) -> None:
    """Raise `UserError` if a train step of `num_bytes` on each device does not fit in memory."""
    estimate = {"by XLA's analysis": float(num_bytes)}
    _check("a train step", estimate, _TRAINING_ADVICE, mesh.local_devices)


def check_generation(model: LanguageModel, batch_size: int, max_new_tokens: int) -> None:
    """Raise `UserError` if `max_new_tokens` of `batch_size` sequences cannot fit in memory."""
    parameters, state = model_bytes(model.config)
    state = batch_size * (state + _FLOAT32 * (model.config.vocab_size + max_new_tokens))
    estimate = {"parameters": parameters, "state": state}
    _check("generating", estimate, "generate fewer sequences or tokens at a time")


def check_evaluation(model: LanguageModel, window: int) -> None:
    """Raise `UserError` if scoring `window` tokens at a time cannot fit in memory."""
    parameters, state = model_bytes(model.config)
    activations = window * (_TOKEN_BYTES + _item_bytes(model.config) * _widest(model.config))
    estimate = {"parameters": parameters, "activations": activations, "state": state}
    _check("scoring", estimate, "lower --window")


def estimate_training(config: Config, sizes: dict[str, int]) -> Estimate:
    """Estimate a train step on one device of a mesh of `sizes`; no automatic microbatches.

    Parameters include the optimizer state. Activations or gradients count, whichever are larger:
    one is freed while the other grows. The state is a recurrent state or KV cache, and logits.
    """
    model, data, train = config.model, config.data, config.train
    parameters, state_bytes = model_bytes(model)
    shards = sizes["tensor"] * sizes["pipeline"]
    weights = parameters / (sizes["fsdp"] * shards)
    moments = 2 if config.optimizer.name == "adamw" else 1
    copies = {"full": 1 + moments, "state": 1}.get(train.tune, 2)  # with the base of low ranks
    copies *= 2 if train.minutes else 1  # steps are timed on a copy of all
    device_sequences = data.batch_size / (sizes["data"] * sizes["fsdp"])
    sequences = device_sequences / (train.gradient_accumulation or 1)
    length = (train.bptt_window or data.sequence_length) / sizes["sequence"]
    channels = _widest(model) / shards
    if sizes["pipeline"] == 1:
        num_mlp = {"plain": 0, "swiglu": 2}.get(model.block, 1) * (train.remat == "none")
        saved = model.hidden_dim + num_mlp * model.mlp_dim / sizes["tensor"]
        channels += model.num_layers * saved
    else:  # stages save only the inputs of their chunks
        channels += model.hidden_dim
    activations = sequences * length * _item_bytes(model) * channels
    state = sequences * model.vocab_size * _FLOAT32 / shards
    if data.mode == "stream":
        state += device_sequences * state_bytes / shards
    elif train.sample_every or data.validation_fraction:
        state = max(state, state_bytes / shards)
    return {
        "parameters": weights * copies,
        "activations": max(weights, activations)
        + device_sequences * data.sequence_length * _TOKEN_BYTES,
        "state": state,
    }


def evaluation_sequences(model: ModelConfig, most: int) -> int:
    """Return how many sequences are scored together: at most `most`, and with bounded states."""
    return max(1, min(most, int(_EVALUATION_STATE_BYTES / max(1, model_bytes(model)[1]))))


@functools.lru_cache(maxsize=32)
def model_bytes(model: ModelConfig) -> tuple[int, int]:
    """Return the bytes of all parameters, and of the state of one sequence."""
    graph, params = abstract_model(model)
    state = jax.eval_shape(lambda params: nnx.merge(graph, params).initial_state(1), params)
    return _num_bytes(params), _num_bytes(state)


def _num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _widest(model: ModelConfig) -> int:
    """Return a lower bound on the channels of a layer's largest activation."""
    return max(model.hidden_dim, 0 if model.block == "plain" else model.mlp_dim)


def _item_bytes(model: ModelConfig) -> int:
    return 2 if model.precision == "bfloat16" else _FLOAT32


def _check(
    task: str, estimate: Estimate, advice: str, devices: Sequence[jax.Device] | None = None
) -> float:
    """Return the fraction of memory that is needed; raises `UserError` if there is not enough."""
    device, *others = devices or jax.local_devices()[:1]
    memory, needed = device_memory(device), sum(estimate.values())
    if memory is None:
        return 0.0
    where, available = device.device_kind, float(memory)
    if device.platform == "cpu":
        available /= 1 + len(others)  # simulated devices share the memory of the machine
        where = f"each of {1 + len(others)} devices" if others else "this machine"
    if needed > available:
        parts = ", ".join(f"{name} {format_bytes(num)}" for name, num in estimate.items())
        raise UserError(
            f"{task} needs at least {format_bytes(needed)} of memory ({parts}), but {where} has "
            f"{format_bytes(available)}; {advice}"
        )
    return needed / available
