"""Typed configuration: the fields of a run, their units, validation, JSON in and out.

A file under ``configs/`` returns a `Config` from ``get_config()``; command-line
overrides (``--config.train.steps=100``) land on it afterwards, so nothing here is
derived at construction: derived values are properties, and `validate` runs once
when everything is in place.
"""

import dataclasses
import difflib
import json
import os
import typing
from typing import Any

from simplernn_jax.errors import UserError

BLOCKS = ("plain", "residual")
MIXERS = ("simple_rnn", "attention")
PRECISIONS = ("float32", "bfloat16")
BATCH_MODES = ("window", "stream", "document")
SPLITS = ("document", "position")
REMATERIALISATION = ("none", "block")
BACKWARD = ("truncated", "exact")
OPTIMIZERS = ("adamw", "muon")
ENCODING_ERRORS = ("strict", "replace")

MAX_LAYERS = 1024
"""Tracing and compiling take time in proportion to the number of layers: here hours."""
MAX_WIDTH = 2**20
MAX_SAMPLE_TOKENS = 2**20
LARGEST_FLOAT = 3.4e38
"""What float32 holds, about."""


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class ModelConfig:
    """Shape and arithmetic of the language model.

    Hashable, because a model keeps a copy of it (never changed) in its static structure.
    """

    vocab_size: int = 259
    """Rows of the embedding and of the head; a run raises it to the tokenizer's number of ids."""
    block: str = "residual"
    """``plain``: the bare layer of the PyTorch project; ``residual``: pre-norm block with MLP."""
    num_layers: int = 4
    hidden_dim: int = 128
    """Width of the embedding and of every layer's input and output."""
    key_dim: int = 128
    """Key channels of all heads together; divisible by num_heads."""
    value_dim: int = 128
    """Value channels of all heads together; divisible by num_heads."""
    num_heads: int = 4
    mlp_dim: int = 512
    """Inner width of the MLP (residual block only)."""
    tie_embeddings: bool = True
    """Use the embedding as the head (residual block only)."""
    dropout: float = 0.0
    """Probability of dropping a channel of each residual branch (residual block only)."""
    precision: str = "float32"
    """Compute dtype of dense layers: ``float32`` or ``bfloat16``. Parameters, gates, sums, norms,
    softmax and loss are float32 either way; cached keys and values are of it."""
    mixer: str = "simple_rnn"
    """What carries information from token to token: ``simple_rnn``, or ``attention`` (residual
    block only), or one of them for each layer, as a list or ``simple_rnn,attention,...``."""
    attention_context: int = 1024
    """Tokens that attention looks back over, the current one included: what its cache holds."""
    state_precision: str = "float32"
    """Dtype of the recurrent state between tokens, or chunks of them: ``float32``; or ``bfloat16``,
    which halves the state and forgets what is small beside it."""

    def __setattr__(self, name: str, value: Any) -> None:
        # A list is kept as text: hashable, one flag, and the same after JSON.
        if name == "mixer":
            names = value.split(",") if isinstance(value, str) else value
            value = ",".join(str(mixer).strip() for mixer in names)
        super().__setattr__(name, value)

    @property
    def mixers(self) -> tuple[str, ...]:
        """The mixer of each layer."""
        names = tuple(self.mixer.split(","))
        return names * self.num_layers if len(names) == 1 else names


@dataclasses.dataclass(kw_only=True)
class DataConfig:
    """Where text comes from and how it becomes batches."""

    source: str = "stdlib"
    """``stdlib`` (the running Python's own library), a file, folder or glob of text, ``.jsonl`` or
    ``.parquet`` (the first two also as ``.gz`` or ``.zst``), or ``tfds:NAME`` (a prepared data
    set's name or directory)."""
    field: str = "text"
    """Field of a JSONL record, Parquet row or TFDS example that holds the text."""
    tokenizer: str = "byte"
    """``byte``, ``char``, a path to a Hugging Face ``tokenizer.json``, or a hub name."""
    split: str = "document"
    """``document``: a seeded choice of whole documents is held out; ``position``: the last part
    of the token stream is, as is that of a single document."""
    validation_fraction: float = 0.05
    """Share held out for validation, in [0, 1); 0 trains on everything."""
    mode: str = "window"
    """``window``: random windows from a zero state; ``stream``: contiguous rows whose state is
    carried from batch to batch (truncated BPTT); ``document``: padded documents."""
    batch_size: int = 16
    """Rows of one optimizer step."""
    sequence_length: int = 256
    """Tokens per row."""
    stride: int = 0
    """Tokens from one window to the next, at most sequence_length (window mode): sliding windows,
    all of them once an epoch in random order. 0 draws windows that begin anywhere."""
    reset_probability: float = 0.0
    """Probability that a row's carried state is cleared before a batch (stream mode)."""
    encoding_errors: str = "strict"
    """Invalid UTF-8: ``strict`` stops with file and offset, ``replace`` puts U+FFFD there."""
    max_bad_records: int = 0
    """Malformed JSONL records or Parquet rows that are skipped and counted before the run stops."""
    cache_dir: str = ""
    """Folder of tokenized corpora; empty: ``tokens`` under the workdir."""


@dataclasses.dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW or Muon with warm-up, cosine decay and global-norm clipping."""

    name: str = "adamw"
    """``adamw``, or ``muon``: orthogonalised momentum for matrices and Adam for the rest, which
    learns more per step and takes longer over it."""
    learning_rate: float = 2e-3
    """Peak learning rate, after warm-up."""
    warmup_steps: int = 50
    """Optimizer steps of linear warm-up from 0."""
    final_learning_rate: float = 0.0
    """Learning rate at the last step, as a fraction of the peak; 1 keeps it constant."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; biases, norms and embeddings are never decayed."""
    beta1: float = 0.9
    """Decay of the mean of the gradients; of Muon's matrices it is 0.95."""
    beta2: float = 0.99
    """Decay of the mean of their squares."""
    epsilon: float = 1e-8
    """Added to what gradients are divided by."""
    clip_norm: float = 1.0
    """Largest global norm of a gradient; 0 does not clip."""


@dataclasses.dataclass(kw_only=True)
class TrainConfig:
    """Length of a run and what happens along the way. Intervals count steps; 0 is never."""

    seed: int = 0
    """In [0, 2**32). Initialisation, split, batches and dropout all follow from it."""
    steps: int = 0
    """Optimizer steps; exactly one of steps and epochs is set."""
    epochs: float = 0.0
    """Passes over the training split."""
    gradient_accumulation: int = 1
    """Groups of rows whose gradients are summed before one update; divides batch_size."""
    max_skipped_updates: int = 10
    """Non-finite updates in a row after which the run stops."""
    log_every: int = 10
    """Steps from one row of ``metrics.jsonl`` to the next; its loss is the mean over them."""
    eval_every: int = 250
    eval_tokens: int = 65536
    """Tokens of the validation split scored at each evaluation during training; 0 scores all of
    it. The evaluation at the end always scores all of it."""
    stop_after_worse: int = 0
    """Evaluations during training in sequence without a new best validation loss, after which the
    run ends (early stopping); 0 never does."""
    save_every: int = 250
    keep_last: int = 2
    """Newest checkpoints kept; at least 2, so that a damaged one has a predecessor."""
    keep_best: int = 1
    """Checkpoints with the lowest validation loss kept beside them, among those whose step was
    evaluated during training: let save_every and eval_every coincide."""
    sample_every: int = 500
    sample_prompt: str = "def main("
    """Text that samples begin with. Where the tokenizer does not know this default, the first line
    of the held-out text takes its place."""
    sample_tokens: int = 120
    profile_steps: int = 0
    """Steps recorded for TensorBoard's profiler, from the third one of the process on."""
    backward_window: int = 0
    """Tokens of a row whose gradient is computed at a time, so that memory is that of so many;
    divides sequence_length. The state goes from one window to the next. 0 takes whole rows."""
    backward: str = "truncated"
    """How gradients pass between windows of a row: ``truncated``, not at all (truncated BPTT), or
    ``exact``, at the cost of computing the forward pass twice."""
    remat: str = "none"
    """What a layer keeps for the gradient: ``none`` keeps everything; ``block`` what the layer
    reads, and computes the rest again."""


@dataclasses.dataclass(kw_only=True)
class MeshConfig:
    """How many devices share each part of the work; their product is the number of devices.

    What it says may change from one resumed run to the next.
    """

    data: int = -1
    """Groups of rows of a batch, each with a copy of the parameters; -1 takes the devices that
    the others leave."""
    fsdp: int = 1
    """Groups of rows whose devices share one copy of the parameters and optimizer state."""
    tensor: int = 1
    """Parts of the heads, the MLP and the vocabulary; divides num_heads, mlp_dim, vocab_size."""
    sequence: int = 1
    """Stretches of the time axis; divides sequence_length."""
    stage: int = 1
    """Groups of consecutive layers, through which chunks of time pass one after another; divides
    num_layers and sequence_length, leaves sequence at 1, and needs one mixer in all layers."""


_Section = typing.TypeVar(
    "_Section", ModelConfig, DataConfig, OptimizerConfig, TrainConfig, MeshConfig
)


@dataclasses.dataclass(kw_only=True)
class Config:
    """Everything a run follows from."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


def validate(config: Config) -> None:
    """Checks every value once, after all overrides.

    Raises:
      UserError: names the field, its value and what is allowed.
    """
    defaults = Config()
    for section in dataclasses.fields(config):
        values, usual = getattr(config, section.name), getattr(defaults, section.name)
        for field in dataclasses.fields(values):
            name = f"{section.name}.{field.name}"
            _check_type(name, getattr(values, field.name), getattr(usual, field.name))
    _validate_model(config.model)
    _validate_data(config.data)
    _validate_optimizer(config.optimizer)
    _validate_train(config)
    _validate_mesh(config)


def _refuse(field: str, value: Any, allowed: str) -> typing.NoReturn:
    raise UserError(
        f"--config.{field}={value!r} is not possible: it must be {allowed}; change it and run again"
    )


def _check_type(field: str, value: Any, default: Any) -> None:
    kinds = {float: (float, int)}.get(type(default), (type(default),))
    if type(value) not in kinds:
        _refuse(field, value, f"of type {type(default).__name__}")
    if type(default) is float and not abs(value) <= LARGEST_FLOAT:
        _refuse(field, value, "a finite number of float32")
    if type(default) is int and abs(value) >= 2**31 and field != "train.seed":
        _refuse(field, value, "below 2**31")


def _choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        _refuse(field, value, f"one of {', '.join(choices)}{hint}")


def _at_least(config: Any, section: str, least: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value < least:
            _refuse(f"{section}.{name}", value, f"at least {least}")


def _at_most(config: Any, section: str, most: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value > most:
            _refuse(f"{section}.{name}", value, f"at most {most}")


def _fraction(config: Any, section: str, *names: str, below_one: bool) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 <= value <= 1 or (below_one and value == 1):
            _refuse(f"{section}.{name}", value, f"in [0, 1{')' if below_one else ']'}")


def _validate_model(model: ModelConfig) -> None:
    _choice("model.block", model.block, BLOCKS)
    _choice("model.precision", model.precision, PRECISIONS)
    _choice("model.state_precision", model.state_precision, PRECISIONS)
    _at_least(model, "model", 1, "vocab_size", "num_layers", "hidden_dim", "key_dim", "value_dim")
    _at_least(model, "model", 1, "num_heads", "mlp_dim")
    _at_least(model, "model", 1, "attention_context")
    _at_most(model, "model", MAX_LAYERS, "num_layers")
    _at_most(model, "model", MAX_WIDTH, "hidden_dim", "key_dim", "value_dim", "mlp_dim")
    _fraction(model, "model", "dropout", below_one=True)
    for name in ("key_dim", "value_dim"):
        width = getattr(model, name)
        if width % model.num_heads:
            _refuse(f"model.{name}", width, f"divisible by model.num_heads={model.num_heads}")
    _validate_mixer(model)


def _validate_mixer(model: ModelConfig) -> None:
    for mixer in model.mixers:
        _choice("model.mixer", mixer, MIXERS)
    if len(model.mixers) != model.num_layers:
        allowed = f"one name, or one for each of model.num_layers={model.num_layers} layers"
        _refuse("model.mixer", model.mixer, allowed)
    if "attention" not in model.mixers:
        return
    if model.block != "residual":
        _refuse("model.mixer", model.mixer, f"simple_rnn where model.block={model.block!r}")
    if model.key_dim // model.num_heads % 2:
        allowed = f"an even number for each of model.num_heads={model.num_heads} with attention"
        _refuse("model.key_dim", model.key_dim, f"{allowed}, which turns pairs of channels")


def _validate_data(data: DataConfig) -> None:
    _choice("data.mode", data.mode, BATCH_MODES)
    _choice("data.split", data.split, SPLITS)
    _choice("data.encoding_errors", data.encoding_errors, ENCODING_ERRORS)
    _at_least(data, "data", 1, "batch_size", "sequence_length")
    _at_least(data, "data", 0, "max_bad_records", "stride")
    if data.stride > data.sequence_length:
        allowed = f"at most data.sequence_length={data.sequence_length}, or text would be left out"
        _refuse("data.stride", data.stride, allowed)
    if data.stride and data.mode != "window":
        _refuse("data.stride", data.stride, f"0 where data.mode={data.mode!r}")
    _fraction(data, "data", "validation_fraction", below_one=True)
    _fraction(data, "data", "reset_probability", below_one=False)
    if os.path.expanduser(data.cache_dir).startswith("~"):
        _refuse("data.cache_dir", data.cache_dir, "of a user that exists, if it begins with ~")
    if not data.source:
        _refuse("data.source", data.source, "stdlib, a path, a glob or tfds:NAME")


def _validate_optimizer(optimizer: OptimizerConfig) -> None:
    section = "optimizer"
    _choice("optimizer.name", optimizer.name, OPTIMIZERS)
    _at_least(optimizer, section, 0, "learning_rate", "warmup_steps", "weight_decay", "clip_norm")
    _fraction(optimizer, section, "beta1", "beta2", below_one=True)
    _fraction(optimizer, section, "final_learning_rate", below_one=False)
    if optimizer.epsilon <= 0:
        _refuse("optimizer.epsilon", optimizer.epsilon, "positive")


def _validate_train(config: Config) -> None:
    train = config.train
    _at_least(
        train, "train", 0, "seed", "steps", "epochs", "log_every", "eval_every", "eval_tokens"
    )
    _at_least(train, "train", 0, "save_every", "keep_best", "sample_every", "sample_tokens")
    _at_least(train, "train", 0, "profile_steps")
    _at_most(train, "train", MAX_SAMPLE_TOKENS, "sample_tokens")
    if train.seed >= 2**32:
        _refuse("train.seed", train.seed, "in [0, 2**32)")
    _at_least(train, "train", 1, "gradient_accumulation", "max_skipped_updates")
    _at_least(train, "train", 2, "keep_last")
    if (train.steps > 0) == (train.epochs > 0):
        raise UserError(
            f"--config.train.steps={train.steps} and --config.train.epochs={train.epochs}: "
            "set exactly one of them above 0"
        )
    _at_least(train, "train", 0, "stop_after_worse")
    if train.stop_after_worse and not (train.eval_every and config.data.validation_fraction):
        allowed = "0 where train.eval_every or data.validation_fraction is 0: nothing is evaluated"
        _refuse("train.stop_after_worse", train.stop_after_worse, allowed)
    _choice("train.remat", train.remat, REMATERIALISATION)
    _choice("train.backward", train.backward, BACKWARD)
    _at_least(train, "train", 0, "backward_window")
    window, length = train.backward_window, config.data.sequence_length
    if window and length % window:
        _refuse("train.backward_window", window, f"a divisor of data.sequence_length={length}")
    if config.data.batch_size % train.gradient_accumulation:
        _refuse(
            "train.gradient_accumulation",
            train.gradient_accumulation,
            f"a divisor of data.batch_size={config.data.batch_size}",
        )


def _validate_mesh(config: Config) -> None:
    mesh = config.mesh
    _at_least(mesh, "mesh", 1, "fsdp", "tensor", "sequence", "stage")
    if mesh.data != -1 and mesh.data < 1:
        _refuse("mesh.data", mesh.data, "at least 1, or -1 for what the others leave")
    if mesh.stage > 1 and mesh.sequence > 1:
        raise UserError(
            f"--config.mesh.stage={mesh.stage} and --config.mesh.sequence={mesh.sequence} divide "
            "the same time axis; set one of them to 1"
        )
    if mesh.sequence > 1 and config.model.state_precision != "float32":
        raise UserError(
            f"--config.model.state_precision={config.model.state_precision} and "
            f"--config.mesh.sequence={mesh.sequence}: stretches of time are put together by exact "
            "sums; set one of them back to float32 or 1"
        )


def to_json(config: Config) -> str:
    """The configuration as indented JSON text."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


_ADDED_LATER = {"config.train.stop_after_worse"}
"""Fields whose default means what was done before there were any: older files lack them."""


def from_json(text: str) -> Config:
    """Reads what `to_json` wrote and validates it; nothing in it is executed.

    Raises:
      UserError: not JSON, an unknown or missing field (with the nearest name), a value of
        another type.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"the configuration is not JSON ({error}); use an undamaged one") from error
    config = Config()
    _fill(config, values, "config")
    validate(config)
    return config


def _fill(target: Any, values: Any, path: str) -> None:
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected an object with fields, found {values!r}")
    names = [field.name for field in dataclasses.fields(target)]
    for name in values:
        if name not in names:
            raise UserError(f"{path}.{name}: no such field{nearest_name(name, names)}")
    for name in names:
        if name not in values and f"{path}.{name}" in _ADDED_LATER:
            continue
        if name not in values:
            raise UserError(f"{path}.{name}: missing; the file was written by another version")
        current = getattr(target, name)
        if dataclasses.is_dataclass(current):
            _fill(current, values[name], f"{path}.{name}")
            continue
        value = values[name]
        if isinstance(current, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(current):
            raise UserError(f"{path}.{name}={value!r}: expected {type(current).__name__}")
        setattr(target, name, value)


def nearest_name(name: str, names: typing.Iterable[str]) -> str:
    """``"; did you mean 'steps'?"``, or an empty string where nothing is near."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def differing_fields(ours: _Section, theirs: _Section) -> list[str]:
    """``["num_layers: 4 here, 2 there"]`` for every field in which two sections differ."""
    return [
        f"{field.name}: {getattr(ours, field.name)!r} here, {getattr(theirs, field.name)!r} there"
        for field in dataclasses.fields(ours)
        if getattr(ours, field.name) != getattr(theirs, field.name)
    ]
