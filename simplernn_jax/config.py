"""Typed configuration of a run: fields with units, validation, JSON in and out.

A file under ``configs/`` returns a `Config` from ``get_config()``; command-line overrides
(``--config.train.steps=100``) are applied afterwards, so derived values are properties, and
`validate` runs once after all overrides.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from simplernn_jax.config_rules import check_values
from simplernn_jax.errors import UserError, counted, nearest_name

GATE_RANK = 16
"""Rank of the gla block's projection to forget gates."""


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
        default = type(self).__dataclass_fields__[name].default  # type: ignore[attr-defined]
        return name in vars(self).get("_assigned", ()) or getattr(self, name) != default


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class ModelConfig(_Fields):
    """Architecture and precision. Hashable, because Flax keeps it in the static graphdef."""

    vocab_size: int = 259
    """Size of embedding and head; a run raises it to that of the tokenizer if that is larger."""
    block: str = "residual"
    """``plain``: the bare layer of the original PyTorch project (docs/pytorch.md); ``residual``:
    pre-norm block with MLP; ``gla``: the block of gated linear attention (docs/gla.md)."""
    num_layers: int = 4
    """Number of blocks."""
    hidden_dim: int = 128
    """Width of the residual stream: the embedding and every layer's input and output."""
    key_dim: int = 128
    """Total key channels of all heads; divisible by num_heads."""
    value_dim: int = 128
    """Total value channels of all heads; divisible by num_heads."""
    num_heads: int = 4
    """Number of heads of the recurrence or of attention."""
    mlp_dim: int = 512
    """Inner width of the MLP (not of the plain block)."""
    tie_embeddings: bool = True
    """Use the embedding as the head (not of the plain block)."""
    dropout: float = 0.0
    """Dropout rate, elementwise, of each residual branch's output (not of the plain block)."""
    precision: str = "float32"
    """Compute dtype of dense layers: ``float32`` or ``bfloat16``. Parameters, gates, accumulators,
    norms, softmax and loss are always float32; cached keys and values have this dtype."""
    mixer: str = "simple_rnn"
    """Token mixer, ``simple_rnn`` or ``attention`` (residual block only): one name for all layers,
    or a comma-separated list (or Python list) with one per layer."""
    attention_context: int = 1024
    """Sliding window of attention in tokens, the current one included; length of the KV cache."""
    state_precision: str = "float32"
    """Dtype of the recurrent state between chunks or decoded tokens: ``float32``; or ``bfloat16``,
    which halves its memory and rounds away small updates."""
    norm_epsilon: float = 1e-6
    """Added to the mean square by every norm; positive (gla block only)."""
    min_log_gate: float = 0.0
    """Lower bound of the logarithms of forget gates, negative; 0 disables it (gla block only)."""
    short_convolution: int = 0
    """Width in tokens, the current one included, of the short convolutions of queries, keys and
    values; 0 disables them (gla block only; the residual block always has one, of 4 tokens)."""

    def __post_init__(self) -> None:
        self.join_mixers()

    def join_mixers(self) -> None:
        """Join a list of mixers into one string: hashable, a single flag and valid JSON."""
        if isinstance(self.mixer, str | list | tuple):
            vars(self)["mixer"] = ",".join(_mixer_names(self.mixer))  # does not make it given

    @property
    def mixers(self) -> tuple[str, ...]:
        """The mixer of each layer."""
        names = tuple(_mixer_names(self.mixer))
        return names * self.num_layers if len(names) == 1 else names


def _mixer_names(mixer: str | Sequence[str]) -> list[str]:
    names = mixer if isinstance(mixer, list | tuple) else str(mixer).split(",")
    return [str(name).strip() for name in names]


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
    field: str = "text"
    """Field of a JSON record, CSV or Parquet row, or TFDS example that holds the text; with a
    template, the default is ``messages``."""
    template: str = ""
    """Chat template, for JSONL of conversations (of OpenAI, ShareGPT or Alpaca): ``roles`` (built
    in), a Jinja file in Hugging Face format, or its text; empty: the records hold text."""
    loss_on: str = "all"
    """Tokens in the loss: ``all``, or those of the ``assistant``'s messages."""
    tokenizer: str = "byte"
    """``byte``, ``char``, ``bpe:SIZE`` (trained on the training split, SIZE ids), a path to a
    Hugging Face ``tokenizer.json``, or a hub name."""
    split: str = "document"
    """``document``: holds out whole documents, sampled with the seed; ``position``: holds out the
    end of the token stream, as for a single document."""
    validation_fraction: float = 0.05
    """Fraction held out for validation, in [0, 1); 0 trains on all of the text."""
    mode: str = "window"
    """``window``: random windows from a zero state; ``stream``: contiguous sequences whose state is
    carried from batch to batch (truncated BPTT); ``document``: padded documents."""
    batch_size: int = 16
    """Sequences of one optimizer step; divisible by data * fsdp, times gradient_accumulation if
    that is not 0."""
    sequence_length: int = 256
    """Tokens per sequence."""
    stride: int = 0
    """Tokens from one window to the next, at most sequence_length (window mode): sliding windows,
    each once an epoch in random order. 0 draws windows at random positions."""
    reset_probability: float = 0.0
    """Probability that a sequence's carried state is reset before a batch (stream mode)."""
    encoding_errors: str = "strict"
    """Invalid text: ``strict`` stops with file and offset, ``replace`` substitutes U+FFFD."""
    max_malformed_records: int = 0
    """Malformed records or rows skipped and counted before the run stops."""
    max_expansion: int = 1000
    """Bytes of text for each byte of a compressed or Parquet file, above which the run stops."""
    cache_dir: str = ""
    """Folder of tokenized corpora; empty: ``tokens`` under the workdir."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; texts from Python become a `PythonSource`."""
        is_texts = name == "source" and not isinstance(value, str)
        if is_texts and (callable(value) or isinstance(value, Sequence)):
            texts, number = value, "texts" if callable(value) else counted(len(value), "text")
            value = PythonSource(f"<{number} from Python>")
            value.texts = lambda: texts() if callable(texts) else texts
        super().__setattr__(name, value)


@dataclasses.dataclass(kw_only=True)
class OptimizerConfig(_Fields):
    """AdamW or Muon with warmup, cosine decay and global-norm clipping."""

    name: str = "adamw"
    """``adamw``, or ``muon``: orthogonalized momentum for the matrices of dense layers, an untied
    head included, and Adam for the rest; a lower loss per step, at a longer time per step."""
    learning_rate: float = 2e-3
    """Peak learning rate, after warmup."""
    warmup_steps: int = 50
    """Optimizer steps of linear warmup, from 1/warmup_steps of the peak."""
    final_learning_rate: float = 0.0
    """Learning rate at the end of the cosine decay (one step after the last), as a fraction of the
    peak; 1 disables decay."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; biases, norms and embeddings are never decayed."""
    beta1: float = 0.9
    """Decay rate of Adam's first moment; Muon's momentum is 0.95."""
    beta2: float = 0.99
    """Decay rate of Adam's second moment."""
    epsilon: float = 1e-8
    """Added to the denominator of Adam's update."""
    clip_norm: float = 1.0
    """Maximum global gradient norm; 0 disables clipping."""


@dataclasses.dataclass(kw_only=True)
class TrainConfig(_Fields):
    """Length of a run and its periodic actions. Intervals are in optimizer steps; 0 disables."""

    seed: int = 0
    """Seed of initialization, split, batches and dropout, in [0, 2**32)."""
    init_from: str = ""
    """Parameters that this run starts from (fine-tuning), with a fresh optimizer at step 0: the
    workdir of a run or its export (safetensors, huggingface); weights of the original PyTorch
    project (.pt, .safetensors); or the folder of a flash-linear-attention model (gla block). Their
    model and tokenizer replace defaults of this configuration; fields that it sets must agree."""
    steps: int = 0
    """Optimizer steps; exactly one of steps and epochs is set."""
    epochs: float = 0.0
    """Passes over the training split."""
    gradient_accumulation: int = 0
    """Microbatches whose gradients are summed before one update; divides batch_size. 0 chooses: on
    a single CPU device, microbatches of about 1,024 tokens, whose activations stay in cache (or of
    one sequence, if it is longer); elsewhere 1."""
    max_skipped_updates: int = 10
    """Consecutive updates with a non-finite loss or gradient after which the run aborts."""
    log_every: int = 10
    """Steps per line of ``metrics.jsonl``; its loss is the mean over them."""
    eval_every: int = 250
    """Steps between evaluations."""
    eval_tokens: int = 65536
    """Tokens of the validation split scored at each evaluation during training; 0 scores all of
    it. The evaluation at the end always scores all of it."""
    stop_after_worse: int = 0
    """Early stopping: consecutive evaluations without a new best validation loss, after which the
    run ends; 0 disables it."""
    save_every: int = 250
    """Steps between checkpoints."""
    keep_last: int = 2
    """Number of newest checkpoints kept; at least 2, so that a corrupted one has a predecessor."""
    keep_best: int = 1
    """Additional checkpoints kept, those with the lowest validation loss. Only steps that are both
    saved and evaluated count, so make eval_every a multiple of save_every."""
    sample_every: int = 500
    """Steps between samples."""
    sample_prompt: str = "def main("
    """Prompt of the samples. If the tokenizer cannot encode this default, the first line of the
    held-out text replaces it."""
    sample_tokens: int = 120
    """Tokens generated for each sample."""
    profile_steps: int = 0
    """Steps recorded for TensorBoard's profiler, starting at the third of the process."""
    backward_window: int = 0
    """Tokens of a window of back-propagation, which bounds activation memory; divides
    sequence_length; 0 is the whole sequence."""
    backward: str = "truncated"
    """``truncated`` stops gradients at window boundaries (truncated BPTT); ``exact`` is full BPTT,
    at the cost of a second forward pass."""
    remat: str = "none"
    """Rematerialization: ``none`` stores all residuals; ``block`` stores the input of each layer
    and recomputes the rest."""


@dataclasses.dataclass(kw_only=True)
class MeshConfig(_Fields):
    """Sizes of the device mesh; a run may be resumed on another.

    Their product divides the number of devices; with several processes it must equal it.
    """

    data: int = -1
    """Data parallelism: shards of the batch, with replicated parameters; -1: the remaining devices.
    data * fsdp, times gradient_accumulation if that is not 0, divides batch_size."""
    fsdp: int = 1
    """Shards of batch, parameters and optimizer state; divides hidden_dim (gla block: and 16)."""
    tensor: int = 1
    """Shards of the heads, the MLP and the vocabulary; divides num_heads, mlp_dim, vocab_size."""
    sequence: int = 1
    """Shards of the time axis; divides backward_window if that is set, else sequence_length."""
    stage: int = 1
    """Pipeline stages of consecutive layers, whose microbatches are chunks of time; divides
    num_layers, and backward_window if that is set, else sequence_length; needs sequence=1 and one
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
    config.model.join_mixers()
    check_values(by_field(config), by_field(Config()), lambda: config.model.mixers)


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


GLA_FIELDS = ("norm_epsilon", "min_log_gate", "short_convolution")
"""Fields of the model that only the gla block has."""


def from_json(text: str) -> Config:
    """Read the text of `to_json` and validate it; nothing in it is executed.

    Raises:
      UserError: not JSON, an unknown or missing field (with the nearest name), a value of
        another type.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # also of too many digits, or nested too deep
        raise UserError(f"configuration: invalid JSON ({error}); use an intact copy") from error
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
        if name not in values:
            raise UserError(f"{path}.{name}: missing; the file was written by another version")
        current = getattr(target, name)
        if dataclasses.is_dataclass(current):
            _fill(current, values[name], f"{path}.{name}")
            continue
        value = values[name]
        if isinstance(current, float) and type(value) is int:
            with contextlib.suppress(OverflowError):  # then it is refused as what it is
                value = float(value)
        if type(value) is not type(current):
            raise UserError(f"{path}.{name}={value!r}: expected {type(current).__name__}")
        setattr(target, name, value)


def differing_fields(current: Any, saved: Any) -> list[str]:
    """Return ``["num_layers is 4, checkpoint has 2"]`` for every field that differs."""
    return [
        f"{field.name} is {getattr(current, field.name)!r}, "
        f"checkpoint has {getattr(saved, field.name)!r}"
        for field in dataclasses.fields(current)
        if getattr(current, field.name) != getattr(saved, field.name)
    ]
