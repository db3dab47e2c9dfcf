"""Allowed values of a configuration, by ``section.field``: choices, ranges and relations."""

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from simplernn_jax.errors import UserError

PRECISIONS = ("float32", "bfloat16")
MIXERS = ("simple_rnn", "attention")
ENCODING_ERRORS = ("strict", "replace")
_CHOICES = {
    "model.block": ("plain", "residual", "gla"),
    "model.precision": PRECISIONS,
    "model.state_precision": PRECISIONS,
    "data.mode": ("window", "stream", "document"),
    "data.split": ("document", "position"),
    "data.loss_mask": ("all", "assistant"),
    "data.encoding_errors": ENCODING_ERRORS,
    "optimizer.name": ("adamw", "muon"),
    "train.remat": ("none", "block"),
    "train.bptt": ("truncated", "full"),
}

_MAX_FLOAT = 3.4e38
"""The largest float32, rounded down."""
_MIN = {
    **dict.fromkeys(("num_layers", "vocab_size", "hidden_dim", "key_dim", "value_dim"), 1),
    **dict.fromkeys(("num_heads", "mlp_dim", "attention_context"), 1),
    **dict.fromkeys(("batch_size", "sequence_length", "max_expansion"), 1),
    **dict.fromkeys(("max_skipped_updates", "fsdp", "tensor", "sequence", "pipeline"), 1),
    "keep_last": 2,
    **dict.fromkeys(("epsilon", "data"), -_MAX_FLOAT),  # checked by `_check_run`
    **dict.fromkeys(("norm_epsilon", "min_log_gate"), -_MAX_FLOAT),  # checked by `_check_gla`
}
"""Minimum by name of the field; 0 for all other numbers."""
_MAX = {
    "num_layers": 1024,  # tracing and compilation take hours
    **dict.fromkeys(("hidden_dim", "key_dim", "value_dim", "mlp_dim", "sample_tokens"), 2**20),
    "short_convolution": 1024,
}
_BELOW_ONE = ("dropout", "validation_fraction", "beta1", "beta2")
_UP_TO_ONE = ("reset_probability", "final_learning_rate")


def check_values(
    values: Mapping[str, Any], defaults: Mapping[str, Any], list_mixers: Callable[[], Sequence[str]]
) -> None:
    """Check types, choices, ranges and relations.

    Args:
      values: by ``section.field``.
      defaults: the same of the default configuration, for the types.
      list_mixers: returns the mixer of each layer; called once their number is known to be valid.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    for field, value in values.items():
        _check_type(field, value, defaults[field])
    for field, choices in _CHOICES.items():
        _check_choice(field, values[field], choices)
    for field, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            _check_range(field, value)
    mixers = list_mixers()
    for mixer in mixers:
        _check_choice("model.mixer", mixer, MIXERS)
    _check_model(values, mixers)
    _check_gla(values, defaults)
    _check_run(values)
    _check_pairs(values)


def _reject(field: str, value: Any, allowed: str) -> NoReturn:
    raise UserError(f"--config.{field}={value!r} is invalid: expected {allowed}")


def _check_type(field: str, value: Any, default: Any) -> None:
    kinds = (float, int) if type(default) is float else (type(default),)
    if type(value) not in kinds and not (str in kinds and isinstance(value, str)):
        _reject(field, value, f"of type {type(default).__name__}")
    if type(default) is float and not abs(value) <= _MAX_FLOAT:
        _reject(field, value, "a number that is finite in float32")
    if type(default) is int and abs(value) >= 2**31 and field != "train.seed":
        _reject(field, value, "below 2**31")


def _check_choice(field: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        _reject(field, value, f"one of {', '.join(choices)}{hint}")


def _check_range(field: str, value: float) -> None:
    name = field.partition(".")[2]
    if name in _BELOW_ONE and not 0 <= value < 1:
        _reject(field, value, "in [0, 1)")
    if name in _UP_TO_ONE and not 0 <= value <= 1:
        _reject(field, value, "in [0, 1]")
    minimum, maximum = _MIN.get(name, 0), _MAX.get(name)
    if value < minimum:
        _reject(field, value, f"at least {minimum}")
    if maximum is not None and value > maximum:
        _reject(field, value, f"at most {maximum}")


def _check_model(values: Mapping[str, Any], mixers: Sequence[str]) -> None:
    heads, block = values["model.num_heads"], values["model.block"]
    for field in ("model.key_dim", "model.value_dim"):
        if values[field] % heads:
            _reject(field, values[field], f"divisible by model.num_heads={heads}")
    if len(mixers) != values["model.num_layers"]:
        layers = values["model.num_layers"]
        allowed = f"one name, or one for each of model.num_layers={layers} layers"
        _reject("model.mixer", values["model.mixer"], allowed)
    if "attention" in mixers and block != "residual":
        _reject("model.mixer", values["model.mixer"], f"simple_rnn with model.block={block!r}")
    if "attention" in mixers and values["model.key_dim"] // heads % 2:
        allowed = f"an even number for each of model.num_heads={heads} with attention, whose"
        allowed += " rotary embedding takes pairs of channels"
        _reject("model.key_dim", values["model.key_dim"], allowed)


def _check_gla(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    if values["model.norm_epsilon"] < 1e-12:  # inputs are scaled by sqrt(1e-6 / epsilon)
        _reject("model.norm_epsilon", values["model.norm_epsilon"], "at least 1e-12")
    if values["model.min_log_gate"] > 0:
        allowed = "negative, or 0 for no lower bound: gates are below 1"
        _reject("model.min_log_gate", values["model.min_log_gate"], allowed)
    if values["model.short_convolution"] == 1:
        _reject("model.short_convolution", 1, "0 for none, or at least 2: a token and earlier ones")
    block = values["model.block"]
    for field in ("model.norm_epsilon", "model.min_log_gate", "model.short_convolution"):
        if block != "gla" and values[field] != defaults[field]:
            _reject(field, values[field], f"{defaults[field]} with model.block={block!r}")


def _check_run(values: Mapping[str, Any]) -> None:
    def reject(field: str, allowed: str) -> NoReturn:
        _reject(field, values[field], allowed)

    length, batch_size = values["data.sequence_length"], values["data.batch_size"]
    stride, mode = values["data.stride"], values["data.mode"]
    window = values["train.bptt_window"]
    if stride > length:
        allowed = f"at most data.sequence_length={length}, or text between windows is skipped"
        reject("data.stride", allowed)
    if stride and mode != "window":
        reject("data.stride", f"0 with data.mode={mode!r}")
    if "\0" in values["data.cache_dir"]:
        reject("data.cache_dir", "a path; none holds a NUL character")
    if os.path.expanduser(values["data.cache_dir"]).startswith("~"):
        reject("data.cache_dir", "a path; ~USER does not name an existing user")
    if "://" in values["data.cache_dir"]:
        reject("data.cache_dir", "a folder; mount a bucket and use its mount point")
    if not values["data.source"]:
        reject("data.source", "stdlib, a path, a glob or tfds:NAME")
    if values["data.loss_mask"] == "assistant" and not values["data.template"]:
        reject("data.loss_mask", "all without data.template")
    if values["optimizer.epsilon"] < 1e-30:  # 0 in float32, or nearly
        reject("optimizer.epsilon", "at least 1e-30")
    for field in ("optimizer.beta1", "optimizer.beta2"):
        if values[field] > 1 - 2**-24:  # 1 in float32
            reject(field, "at most 1 - 2**-24")
    if values["train.seed"] >= 2**32:
        reject("train.seed", "in [0, 2**32)")
    is_evaluated = values["train.eval_every"] and values["data.validation_fraction"]
    if values["train.early_stopping_patience"] and not is_evaluated:
        allowed = "0 if train.eval_every or data.validation_fraction is 0: nothing is evaluated"
        reject("train.early_stopping_patience", allowed)
    if window and length % window:
        reject("train.bptt_window", f"a divisor of data.sequence_length={length}")
    if batch_size % max(1, values["train.gradient_accumulation"]):
        reject("train.gradient_accumulation", f"a divisor of data.batch_size={batch_size}")
    if values["mesh.data"] < 1 and values["mesh.data"] != -1:
        reject("mesh.data", "at least 1, or -1 for the remaining devices")


def _check_pairs(values: Mapping[str, Any]) -> None:
    steps, epochs = values["train.steps"], values["train.epochs"]
    if (steps > 0) == (epochs > 0):
        raise UserError(
            f"--config.train.steps={steps} and --config.train.epochs={epochs}: "
            "set exactly one of them above 0"
        )
    pipeline, sequence = values["mesh.pipeline"], values["mesh.sequence"]
    if pipeline > 1 and sequence > 1:
        raise UserError(
            f"--config.mesh.pipeline={pipeline} and --config.mesh.sequence={sequence} divide the "
            "same time axis; set one of them to 1"
        )
    precision = values["model.state_precision"]
    if sequence > 1 and precision != "float32":
        raise UserError(
            f"--config.model.state_precision={precision} and --config.mesh.sequence={sequence}: "
            "the states of sequence shards are combined in float32; set one of them back to "
            "float32 or 1"
        )
