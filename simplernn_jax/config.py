"""Typed configuration of a run: fields with units, validation, JSON in and out.

A file under ``configs/`` returns a `Config` from ``get_config()``; command-line overrides
(``--config.train.steps=100``) are applied afterwards, so derived values are properties, and
`validate` runs once after all overrides. Numbers are at least 0 unless their field says otherwise.
"""

import dataclasses
import json
import re
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from simplernn_jax.errors import UserError, counted, nearest_name

Scalar = bool | int | float | str
PRECISIONS = ("float32", "bfloat16")
ENCODING_ERRORS = ("strict", "replace")
_MAX_SIZE = 2**20
_MAX_BETA = 1 - 2**-24
"""The largest float32 below 1."""
_MAX_FLOAT = 3.4e38
"""The largest float32, rounded down."""


def _number(default: Any, **limits: float) -> Any:
    """Return a field with limits: `at_least`, `at_most`, `below`."""
    return dataclasses.field(default=default, metadata=limits)


def _one_of(choices: Sequence[str], default: str) -> Any:
    """Return a field whose value is one of `choices`."""
    return dataclasses.field(default=default, metadata={"choices": choices})


class _Fields:
    """Base of the configurations, which have no other attributes than their fields."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; AttributeError for an unknown one, TypeError for a section of wrong type."""
        fields = type(self).__dataclass_fields__  # type: ignore[attr-defined]
        where = f"{type(self).__name__}.{name}"
        if name not in fields:
            raise AttributeError(f"{where}: no such field{nearest_name(name, fields)}")
        kind = fields[name].type
        if isinstance(kind, type) and issubclass(kind, _Fields) and not isinstance(value, kind):
            raise TypeError(f"{where}: must be a {kind.__name__}, not {type(value).__name__}")
        if name in vars(self):  # by a file or the command line, after it was constructed
            vars(self).setdefault("_assigned", set()).add(name)
        super().__setattr__(name, value)

    def is_given(self, name: str) -> bool:
        """Return whether the user chose a field's value: it was assigned, or is not the default."""
        field = type(self).__dataclass_fields__[name]  # type: ignore[attr-defined]
        default = {} if field.default is dataclasses.MISSING else field.default
        return name in vars(self).get("_assigned", ()) or getattr(self, name) != default


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class ModelConfig(_Fields):
    """Architecture and precision. Hashable, because Flax keeps it in the static graphdef."""

    vocab_size: int = _number(259, at_least=1)
    """Size of embedding and head; a run raises it to the tokenizer's if that is larger."""
    block: str = _one_of(("parallel", "plain", "residual", "swiglu"), "parallel")
    """``parallel``: pre-norm block whose mixer and MLP both read a short convolution of the tokens;
    ``residual``: the same with the MLP after the mixer, the default of earlier versions;
    ``plain``: the bare layer of the original PyTorch project (docs/pytorch.md); ``swiglu``: the
    pre-norm block of Llama and of gated linear attention (docs/mixers.md)."""
    num_layers: int = _number(4, at_least=1, at_most=1024)
    """Number of blocks."""
    hidden_dim: int = _number(128, at_least=1, at_most=_MAX_SIZE)
    """Width of the residual stream: the embedding and every layer's input and output."""
    key_dim: int = _number(128, at_least=1, at_most=_MAX_SIZE)
    """Total key channels of all heads; divisible by num_heads."""
    value_dim: int = _number(128, at_least=1, at_most=_MAX_SIZE)
    """Total value channels of all heads; divisible by num_heads."""
    num_heads: int = _number(4, at_least=1)
    """Number of heads of the recurrence or of attention."""
    mlp_dim: int = _number(512, at_most=_MAX_SIZE)
    """Inner width of the MLP (not of the plain block); 0: none (swiglu block only)."""
    tie_embeddings: bool = True
    """Use the embedding as the head (not of the plain block)."""
    dropout: float = _number(0.0, below=1)
    """Dropout rate, elementwise, of each residual branch's output (not of the plain block), rounded
    to a multiple of 1/256."""
    precision: str = _one_of(PRECISIONS, "float32")
    """Compute dtype of dense layers: ``float32`` or ``bfloat16``. Parameters, gates, accumulators,
    recurrent states, norms, softmax and loss are always float32; cached keys and values have this
    dtype."""
    mixer: str = "simple_rnn"
    """Token mixer, ``simple_rnn``, ``attention``, ``gla``, ``retnet``, ``hgrn2``, ``mamba2``,
    ``gated_delta_net``, or one from your own file (docs/architecture.md): one name for all layers,
    or a comma-separated list (or Python list) with one per layer."""
    mixer_options: dict[str, Scalar] = dataclasses.field(default_factory=dict, hash=False)
    """Options of the mixers, on the command line as ``name=value,name=value``. Attention has
    ``context`` (1024): the tokens of its sliding window and KV cache, the current one included. For
    others see docs/mixers.md; your own mixers have their own."""
    norm_epsilon: float = _number(1e-6, at_least=1e-12)
    """Added to the mean square by every norm; positive (swiglu block only)."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; a list of mixers becomes one string: hashable, and a single flag."""
        if name == "mixer" and isinstance(value, str | list | tuple):
            names = value.split(",") if isinstance(value, str) else map(str, value)
            value = ",".join(each.strip() for each in names)
        if name == "mixer_options" and isinstance(value, dict):
            value = dict(value)  # not shared with a copy
        super().__setattr__(name, value)

    @property
    def is_convolved(self) -> bool:
        """Whether the blocks have a short convolution."""
        return self.block in ("parallel", "residual")

    @property
    def mixers(self) -> tuple[str, ...]:
        """The mixer of each layer."""
        names = tuple(self.mixer.split(","))
        return names * self.num_layers if len(names) == 1 else names


class PythonSource(str):
    """Texts from Python as ``data.source``: the description that JSON and messages show."""

    texts: Callable[[], Iterable[str]]
    """Returns the texts, the same at every call."""


@dataclasses.dataclass(kw_only=True)
class DataConfig(_Fields):
    """Source of the text, tokenization, splits and batches."""

    source: str = "stdlib"
    """``stdlib`` (the running Python's standard library), a file, folder or glob of text,
    ``.jsonl``, ``.json`` or ``.csv`` (all also as ``.gz`` or ``.zst``) or ``.parquet``, or
    ``tfds:NAME`` (name or directory of a prepared dataset); or a mixture of them by weight,
    ``a/:0.7,b.jsonl:0.3``. From Python, also a list of texts, or a function that returns an
    iterable of them, the same at every call."""
    all_files: bool = False
    """Whether a folder's generated, minified and lock files are read too, and in a git repository
    those that it does not track."""
    field: str = "text"
    """Field of a JSON record, CSV or Parquet row, or TFDS example that holds the text; with a
    template, the default is ``messages``."""
    template: str = ""
    """Chat template, for JSONL of conversations (of OpenAI or ShareGPT): ``roles`` (built in), a
    Jinja file in Hugging Face format, or its text; empty: the records hold text."""
    loss_mask: str = _one_of(("all", "assistant"), "all")
    """Tokens in the loss: ``all``, or only the ``assistant``'s messages."""
    tokenizer: str = "byte"
    """``byte``, ``char``, ``bpe:SIZE`` (trained on the training split, SIZE ids), a path to a
    Hugging Face ``tokenizer.json``, or a hub name."""
    fim_rate: float = _number(0.0, at_most=1)
    """Fraction of the text whose parts are rearranged so that the model learns to fill in the
    middle, for completion in an editor; above 0, the tokenizer has three more ids."""
    split: str = _one_of(("document", "position"), "document")
    """``document``: holds out whole documents, sampled with the seed; ``position``: holds out the
    end of the token stream, as for a single document."""
    validation_fraction: float = _number(0.05, below=1)
    """Fraction held out for validation, in [0, 1); 0 trains on all of the text."""
    mode: str = _one_of(("window", "stream", "document"), "window")
    """``window``: windows from a zero state; ``stream``: contiguous sequences whose state is
    carried from batch to batch (truncated BPTT); ``document``: padded documents."""
    batch_size: int = _number(16, at_least=1)
    """Sequences of one optimizer step; divisible by data * fsdp, times gradient_accumulation if
    that is set."""
    sequence_length: int = _number(256, at_least=1)
    """Tokens per sequence."""
    stride: int | None = _number(None, at_least=0)
    """Tokens from one window to the next, at most sequence_length (window mode): sliding windows,
    each once an epoch in random order. None: sequence_length, so that an epoch has every token
    once. 0 draws windows at random positions, as None does for a mixture."""
    reset_probability: float = _number(0.0, at_most=1)
    """Probability that a sequence's carried state is reset before a batch (stream mode)."""
    encoding_errors: str = _one_of(ENCODING_ERRORS, "strict")
    """Invalid text: ``strict`` stops with file and offset, ``replace`` substitutes U+FFFD."""
    max_malformed_records: int = 0
    """Malformed records or rows skipped and counted before the run stops."""
    max_expansion: int = _number(1000, at_least=1)
    """Bytes of text for each byte of a compressed or Parquet file, above which the run stops."""
    cache_dir: str = ""
    """Folder of tokenized corpora; empty: ``tokens`` under the workdir."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; texts from Python become a `PythonSource`."""
        is_texts = name == "source" and not isinstance(value, str)
        is_sequence = isinstance(value, Sequence) and not isinstance(value, bytes | bytearray)
        if is_texts and (callable(value) or is_sequence):
            texts, number = value, "texts" if callable(value) else counted(len(value), "text")
            value = PythonSource(f"<{number} from Python>")
            value.texts = lambda: texts() if callable(texts) else texts
        super().__setattr__(name, value)


@dataclasses.dataclass(kw_only=True)
class OptimizerConfig(_Fields):
    """AdamW or Muon with warmup, cosine decay and global-norm clipping."""

    name: str = _one_of(("adamw", "muon"), "adamw")
    """``adamw``, or ``muon``: orthogonalized momentum for the matrices of dense layers, an untied
    head included, and Adam for the rest; a lower loss per step, at a longer time per step."""
    learning_rate: float = 2e-3
    """Peak learning rate, after warmup; if it is not set, ``train.tune`` chooses another one. With
    muon, matrices and embedding have it times sqrt(128 / hidden_dim): one rate for all widths."""
    warmup_steps: int = 50
    """Optimizer steps of linear warmup, from 1/warmup_steps of the peak."""
    final_learning_rate: float = _number(0.0, at_most=1)
    """Learning rate at the end of the cosine decay (one step after the last), as a fraction of the
    peak; 1 disables decay."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; biases, norms and embeddings are never decayed."""
    beta1: float = _number(0.9, at_most=_MAX_BETA)
    """Decay rate of Adam's first moment; Muon's momentum is 0.95."""
    beta2: float = _number(0.99, at_most=_MAX_BETA)
    """Decay rate of Adam's second moment."""
    epsilon: float = _number(1e-8, at_least=1e-30)
    """Added to the denominator of Adam's update."""
    clip_norm: float = 1.0
    """Maximum global gradient norm; 0 disables clipping."""


@dataclasses.dataclass(kw_only=True)
class TrainConfig(_Fields):
    """Length of a run and its periodic actions. Intervals are in optimizer steps; 0 disables."""

    seed: int = _number(0, at_most=2**32 - 1)
    """Seed of initialization, split, batches and dropout, in [0, 2**32)."""
    init_from: str = ""
    """Parameters that this run starts from (fine-tuning), with a fresh optimizer at step 0: the
    workdir of a run or its export (safetensors, huggingface); weights of the original PyTorch
    project (.pt, .safetensors); or the folder of a flash-linear-attention model. Their
    model and tokenizer replace defaults of this configuration; fields that it sets must agree."""
    minutes: float = _number(0.0, at_most=_MAX_SIZE)
    """Wall time of the whole command (also ``--minutes``), in place of steps and epochs: a new run
    measures its speed, sets steps, warmup_steps (at most the given one), held_out_tokens and the
    intervals that are not 0 from it, and this to 0; a run that exists keeps its own."""
    tune: str = "full"
    """What a run with init_from trains: ``full``, all parameters; ``lora:RANK``, low-rank updates
    of the projections; ``state``, only the initial state (docs/fine_tuning.md)."""
    steps: int = 0
    """Optimizer steps; exactly one of steps and epochs is set, or minutes."""
    epochs: float = _number(0.0, at_most=_MAX_SIZE)
    """Passes over the training split."""
    gradient_accumulation: int | None = _number(None, at_least=1)
    """Microbatches whose gradients are summed before one update; divides batch_size. None chooses:
    on a single CPU device, microbatches of about 1,024 tokens, whose activations stay in cache (or
    of one sequence, if it is longer); elsewhere 1."""
    max_skipped_updates: int = _number(10, at_least=1)
    """Consecutive updates with a non-finite loss or gradient after which the run aborts."""
    log_every: int = 10
    """Steps per line of ``metrics.jsonl``; its loss is the mean over them."""
    eval_every: int = 250
    """Steps between evaluations."""
    eval_tokens: int = 65536
    """Tokens of the validation split scored at each evaluation during training; 0 scores all of
    it."""
    held_out_tokens: int = 0
    """Tokens of the validation split scored at the end of the run; 0 scores all of it."""
    early_stopping_patience: int = 0
    """Early stopping: consecutive evaluations without a new best validation loss, after which the
    run ends; 0 disables it."""
    save_every: int = 250
    """Steps between checkpoints."""
    keep_last: int = _number(2, at_least=2)
    """Number of newest checkpoints kept; at least 2, so that a corrupted one has a predecessor."""
    keep_best: int = 1
    """Additional checkpoints kept, those with the lowest validation loss. Only steps that are both
    saved and evaluated count, so make eval_every a multiple of save_every."""
    sample_every: int = 500
    """Steps between samples."""
    sample_prompt: str = ""
    """Prompt of the samples, or the message that they answer; empty starts a new document."""
    sample_tokens: int = _number(120, at_most=_MAX_SIZE)
    """Tokens generated for each sample."""
    profile_steps: int = 0
    """Steps recorded for TensorBoard's profiler, starting at the third of the process."""
    bptt_window: int = 0
    """Tokens of a window of back-propagation, which bounds activation memory; divides
    sequence_length; 0 is the whole sequence."""
    bptt: str = _one_of(("truncated", "full"), "truncated")
    """``truncated`` stops gradients at window boundaries (truncated BPTT); ``full`` is exact,
    at the cost of a second forward pass."""
    remat: str = _one_of(("none", "block"), "none")
    """Rematerialization: ``none`` stores all residuals; ``block`` stores the input of each layer
    and recomputes the rest."""


@dataclasses.dataclass(kw_only=True)
class MeshConfig(_Fields):
    """Sizes of the device mesh; a run may be resumed on another.

    Their product divides the number of devices; with several processes it must equal it.
    """

    data: int | None = _number(None, at_least=1)
    """Data parallelism: shards of the batch, with replicated parameters; None: the remaining
    devices. data * fsdp, times gradient_accumulation if that is set, divides batch_size."""
    fsdp: int = _number(1, at_least=1)
    """Shards of batch, parameters and optimizer state; divides hidden_dim (gla: and 16)."""
    tensor: int = _number(1, at_least=1)
    """Shards of the heads, the MLP and the vocabulary; divides num_heads, mlp_dim, vocab_size."""
    sequence: int = _number(1, at_least=1)
    """Shards of the time axis; divides bptt_window if that is set, else sequence_length."""
    pipeline: int = _number(1, at_least=1)
    """Pipeline stages of consecutive layers, whose microbatches are chunks of time; divides
    num_layers, and bptt_window if that is set, else sequence_length; needs sequence=1 and one
    mixer in all layers."""


@dataclasses.dataclass(kw_only=True)
class Config(_Fields):
    """Complete configuration of a run."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


def validate(config: Config) -> None:
    """Check every value once, after all overrides.

    Raises:
      UserError: names the field, its value and what is allowed; or it is not a `Config`.
    """
    if not isinstance(config, Config):
        raise UserError(f"config: {type(config).__name__}; pass a simplernn_jax.Config")
    for section in dataclasses.fields(config):
        fields = getattr(config, section.name)
        for field in dataclasses.fields(fields):
            _check_value(f"{section.name}.{field.name}", field, getattr(fields, field.name))
    _check_model(config.model)
    _check_data(config.data)
    _check_run(config)


def _reject(field: str, value: Any, allowed: str) -> NoReturn:
    raise UserError(f"config.{field}={value!r} is invalid: expected {allowed}")


def _check_value(name: str, field: dataclasses.Field[Any], value: Any) -> None:
    """Check a value by itself: its type, and the limits of its field."""
    types = types_of(field)
    is_number = type(value) in (int, float)
    if float in types and is_number:
        if not abs(value) <= _MAX_FLOAT:
            _reject(name, value, "a number that is finite in float32")
    elif type(value) not in types and not (str in types and isinstance(value, str)):
        _reject(name, value, f"a value of type {types[0].__name__}")
    choices = field.metadata.get("choices", [value])
    if value not in choices:
        _reject(name, value, f"one of {', '.join(choices)}{nearest_name(value, choices)}")
    if is_number:
        at_least, below = field.metadata.get("at_least", 0), field.metadata.get("below")
        most = 2**31 - 1 if type(value) is int else _MAX_FLOAT
        at_most = field.metadata.get("at_most", most)
        if value < at_least:
            _reject(name, value, f"at least {at_least}")
        if value > at_most:
            _reject(name, value, f"at most {at_most}")
        if below is not None and value >= below:
            _reject(name, value, f"below {below}")


def types_of(field: dataclasses.Field[Any]) -> tuple[type, ...]:
    """Return the type of a field, and NoneType if it may be None."""
    if typing.get_origin(field.type) is dict:
        return (dict,)
    return typing.get_args(field.type) or (field.type,)


def _check_model(model: ModelConfig) -> None:
    heads, layers = model.num_heads, model.num_layers
    for name in ("key_dim", "value_dim"):
        value = getattr(model, name)
        if value % heads:
            _reject(f"model.{name}", value, f"divisible by config.model.num_heads={heads}")
    if len(model.mixers) != layers:
        allowed = f"one name, or one for each of config.model.num_layers={layers} layers"
        _reject("model.mixer", model.mixer, allowed)
    if model.block != "swiglu" and model.norm_epsilon != ModelConfig.norm_epsilon:
        allowed = f"{ModelConfig.norm_epsilon} with config.model.block={model.block!r}"
        _reject("model.norm_epsilon", model.norm_epsilon, allowed)
    if model.is_convolved and not model.mlp_dim:
        _reject("model.mlp_dim", 0, f"at least 1 with config.model.block={model.block!r}")
    for name, value in model.mixer_options.items():
        is_scalar = isinstance(value, bool | int | str) or (
            isinstance(value, float) and abs(value) <= _MAX_FLOAT
        )
        if not isinstance(name, str) or not is_scalar:
            allowed = "a dict of names and finite numbers, strings or booleans"
            _reject("model.mixer_options", model.mixer_options, allowed)
    from simplernn_jax.models.mixers.token_mixer import check_mixers  # imports JAX

    check_mixers(model)


def _check_data(data: DataConfig) -> None:
    length = data.sequence_length
    if (data.stride or 0) > length:
        allowed = f"at most config.data.sequence_length={length}, or some text is skipped"
        _reject("data.stride", data.stride, allowed)
    if data.stride and data.mode != "window":
        _reject("data.stride", data.stride, f"0 with config.data.mode={data.mode!r}")
    if "://" in data.cache_dir:
        _reject(
            "data.cache_dir", data.cache_dir, "a folder; mount a bucket and use its mount point"
        )
    if not data.source:
        _reject("data.source", data.source, "stdlib, a path, a glob or tfds:NAME")
    if data.loss_mask == "assistant" and not data.template:
        _reject("data.loss_mask", data.loss_mask, "all without config.data.template")
    if data.fim_rate and data.template:
        _reject("data.fim_rate", data.fim_rate, "0 with config.data.template")


def _check_run(config: Config) -> None:
    train, data, mesh = config.train, config.data, config.mesh
    if train.early_stopping_patience and not (train.eval_every and data.validation_fraction):
        allowed = "0 if train.eval_every or data.validation_fraction is 0: nothing is evaluated"
        _reject("train.early_stopping_patience", train.early_stopping_patience, allowed)
    if train.bptt_window and data.sequence_length % train.bptt_window:
        allowed = f"a divisor of config.data.sequence_length={data.sequence_length}"
        _reject("train.bptt_window", train.bptt_window, allowed)
    if data.batch_size % (train.gradient_accumulation or 1):
        allowed = f"a divisor of config.data.batch_size={data.batch_size}"
        _reject("train.gradient_accumulation", train.gradient_accumulation, allowed)
    if not train.minutes and (train.steps > 0) == (train.epochs > 0):
        raise UserError(
            f"config.train.steps={train.steps} and config.train.epochs={train.epochs}: "
            "set exactly one of them above 0, or config.train.minutes"
        )
    if mesh.pipeline > 1 and mesh.sequence > 1:
        raise UserError(
            f"config.mesh.pipeline={mesh.pipeline} and config.mesh.sequence={mesh.sequence} divide "
            "the same time axis; set one of them to 1"
        )
    if not re.fullmatch("full|state|lora:[1-9][0-9]{0,5}", train.tune):
        _reject("train.tune", train.tune, "full, state, or lora:RANK such as lora:8")
    if train.tune != "full" and not train.init_from:
        _reject("train.tune", train.tune, "full without config.train.init_from, the model to tune")
    if train.tune == "state":
        if data.mode == "stream":
            _reject("data.mode", "stream", "window or document with config.train.tune='state'")
        for axis in ("tensor", "sequence", "pipeline"):
            if getattr(mesh, axis) > 1:
                _reject(f"mesh.{axis}", getattr(mesh, axis), "1 with config.train.tune='state'")


SET_BY_MINUTES = (
    "train.epochs",
    "train.steps",
    "train.eval_every",
    "train.save_every",
    "train.sample_every",
    "train.held_out_tokens",
)
"""Fields that follow from ``train.minutes``, besides warmup_steps, which it may lower."""


def by_field(config: Config) -> dict[str, Any]:
    """Return every value by ``section.field``."""
    return {
        f"{section}.{name}": value
        for section, fields in dataclasses.asdict(config).items()
        for name, value in fields.items()
    }


def to_json(config: Config) -> str:
    """Return the configuration as indented JSON text."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """Read the text of `to_json` and validate it; nothing in it is executed.

    A field that is missing, since an earlier version wrote the text, has its default.

    Raises:
      UserError: not JSON, an unknown field (with the nearest name), a value of another type.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # also of too many digits, or nested too deep
        raise UserError(f"configuration: invalid JSON ({error}); use an intact copy") from error
    config = Config()
    _fill(config, values, "")
    validate(config)
    return config


def _fill(target: Any, values: Any, path: str) -> None:
    if not isinstance(values, dict):
        raise UserError(f"{path or 'configuration'}: expected an object, found {values!r}")
    prefix = f"{path}." if path else ""
    names = [field.name for field in dataclasses.fields(target)]
    for name, value in values.items():
        if name not in names:
            raise UserError(f"{prefix}{name}: no such field{nearest_name(name, names)}")
        if dataclasses.is_dataclass(getattr(target, name)):
            _fill(getattr(target, name), value, f"{prefix}{name}")
        else:
            setattr(target, name, value)


def differing_fields(current: Config, saved: Config) -> dict[str, str]:
    """Return ``"config.model.num_layers is 4, checkpoint has 2"`` for every field that differs."""
    before = by_field(saved)
    return {
        name: f"config.{name} is {value!r}, checkpoint has {before[name]!r}"
        for name, value in by_field(current).items()
        if value != before[name]
    }
