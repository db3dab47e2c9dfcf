"""What the formats of an export share. Each is a module with two functions:

    write(trained: TrainedModel, folder: Path)   write the files into an empty folder
    load(folder: Path) -> Loaded                 load them, as users do

`write` raises `UserError` if the format does not support the model or its tokenizer, or if a
package is missing.
"""

import dataclasses
import importlib
import importlib.util
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from simplernn_jax.config import Config
from simplernn_jax.data.chat_template import ChatTemplate, Message, TemplateError
from simplernn_jax.data.pretrained_tokenizer import byte_level_alphabet
from simplernn_jax.data.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    InfillingTokenizer,
    Tokenizer,
    ids_without_text,
)
from simplernn_jax.errors import UserError, one_line
from simplernn_jax.export import example
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.fla_checkpoint import is_fla, to_fla_config
from simplernn_jax.models.language_model import abstract_model
from simplernn_jax.models.mixers.token_mixer import complete_options
from simplernn_jax.models.pytorch_weights import Weights


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """The model to export."""

    model: LanguageModel
    """Computes in float32, as all exports do."""
    tokenizer: Tokenizer
    config: Config
    """Configuration of the run, without paths of the machine it ran on."""
    workdir: str
    """Folder of the run, whose metrics describe the model."""
    quantize: str = "none"
    """Storage of the weights: one of `QUANTIZATIONS`."""
    license: str = ""
    """Name of the license of the weights; empty if none was stated."""
    languages: tuple[str, ...] = ()
    """Codes of the languages of the text, if stated."""

    @property
    def name(self) -> str:
        """The name of the run, one printable line."""
        return one_line(Path(self.workdir).name)


class Loaded(Protocol):
    """An exported model, as its users load it."""

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Compute the logits after each of [T] tokens from a zero state: [T, vocab]."""

    def encode(self, text: str) -> list[int]:
        """Encode `text` without BOS."""


def find_format(name: str) -> ModuleType:
    """Import the module of one of `FORMATS`."""
    return importlib.import_module(f"simplernn_jax.export.{name}")


def check_architecture(format_name: str, model: LanguageModel) -> None:
    """Raise `UserError` for a model that the programs of this format do not have."""
    block, mixers = model.config.block, {*model.config.mixers}
    convolved = {"simple_rnn", "attention"} if model.config.is_convolved else set()
    if not mixers <= ({"simple_rnn"} if block == "plain" else convolved):
        raise UserError(
            f"--format={format_name}: not possible with model.block={block!r} and "
            f"model.mixer={model.config.mixer!r}; use safetensors or stablehlo"
        )


def check_packages(format_name: str, *names: str) -> None:
    """Raise `UserError` that names the first missing package, and how to install it."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            what = "mini-racer" if name == "py_mini_racer" else "'simplernn_jax[export]'"
            raise UserError(f"--format={format_name} needs the package {name}: pip install {what}")


def float32_model(model: LanguageModel) -> LanguageModel:
    """Return a model with the same parameters that computes in float32."""
    config = dataclasses.replace(model.config, precision="float32")
    if config == model.config:
        return model
    return nnx.merge(abstract_model(config)[0], nnx.state(model, nnx.Param))


def compute_logits(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """Compute the logits [T, vocab] after each of [T] tokens."""
    return np.asarray(model(jnp.asarray(tokens[None], jnp.int32))[0][0])


def description(trained: TrainedModel) -> dict[str, Any]:
    """Describe the model as ``config.json`` does."""
    config = trained.model.config
    ids = {
        "dtype": "float32",
        "bos_token_id": trained.tokenizer.bos_id,
        "eos_token_id": trained.tokenizer.eos_id,
        "pad_token_id": trained.tokenizer.pad_id,
    }
    if is_fla(config):
        return {**to_fla_config(config), **ids}
    fields = dataclasses.asdict(config)
    for name in ("mixer", "mixer_options", "dropout", "precision"):
        del fields[name]
    if "attention" in config.mixers:
        options = complete_options("attention", config).mixer_options
        fields["attention_context"] = options["context"]
    return {"model_type": "simplernn", **fields, "mixers": list(config.mixers), **ids}


def write_json(path: Path, content: Any) -> None:
    """Write `content` to a file, indented."""
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def library_tokenizer(tokenizer: Tokenizer) -> Any:
    """Return the tokenizer as `tokenizers.Tokenizer`, in which other special ids have no token."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    if isinstance(tokenizer, InfillingTokenizer):
        tokenizer = tokenizer.base
    saved = json.loads(tokenizer.to_json())
    if isinstance(tokenizer, ByteTokenizer):
        # Byte-level BPE without merges: a token for each byte.
        result = tokenizers.Tokenizer(models.BPE(byte_level_alphabet(), []))
        result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        result.decoder = decoders.ByteLevel()
    elif isinstance(tokenizer, CharTokenizer):
        # Words of one character; without an unknown token, other characters are errors.
        alphabet = {character: i for i, character in enumerate(saved["alphabet"])}
        result = tokenizers.Tokenizer(models.WordLevel(alphabet, unk_token="<|unknown|>"))  # noqa: S106
        every = tokenizers.Regex(r"[\s\S]")
        result.pre_tokenizer = pre_tokenizers.Split(every, "isolated")
        result.decoder = decoders.Fuse()
    else:
        result = tokenizers.Tokenizer.from_str(saved["tokenizer"])
        result.no_truncation()
        result.no_padding()
    return result


def write_example(
    trained: TrainedModel,
    folder: Path,
    readme: Mapping[str, str],
    batch: str | int,
    state: Mapping[str, Any],
    **fields: Any,
) -> None:
    """Write what comes with two programs: ``config.json``, the tokenizer, the example and a README.

    Args:
      trained: the model.
      folder: of the export.
      readme: the parts of ``example.md`` that differ between formats.
      batch: batch size of the programs, for ``config.json``.
      state: arrays of the initial state of one sequence by name.
      **fields: what the format adds to ``config.json``.

    Raises:
      UserError: an array of the state is more than one number.
    """
    parts = {}
    for name, x in state.items():
        value = x.flatten()[0].item()
        if not (x == value).all():
            raise UserError(
                f"the initial state {name} is not a single number, as this format needs; use "
                "--format=safetensors"
            )
        parts[name] = {"shape": [batch, *x.shape[1:]], "dtype": str(x.dtype), "value": value}
    banned = ids_without_text(trained.tokenizer, trained.model.config.vocab_size)
    content = {
        **description(trained),
        "suppress_tokens": sorted(banned),
        "chat": chat_format(trained.config.data.template),
        "prefill_tokens": example.PREFILL_TOKENS,
        "state": parts,
        **fields,
    }
    write_json(folder / "config.json", content)
    (folder / "tokenizer.json").write_text(library_tokenizer(trained.tokenizer).to_str(), "utf-8")
    shutil.copyfile(example.__file__, folder / "example.py")
    template = Path(example.__file__).with_suffix(".md").read_text("utf-8")
    (folder / "README.md").write_text(template.format(**readme), "utf-8")


_MARK = "question 8254093"
_PROBES = ("x", "2 > 1  \n\n\tand\r\n more", "É漢😀 don't", "<b>&amp;{{ 1 }}{% x %}\\n")


def chat_format(template: str) -> dict[str, Any] | None:
    """Return the text around messages, as `Conversation` renders them.

    Returns:
      ``first`` and ``next``: the parts before and after the first question and each later one, up
      to the answer; ``end_of_turn``: the text after an answer; ``stop``: the part of it that ends
      generation. Questions have no white space at their ends, which many templates remove.
      None without a template or, with a warning, if the template does more than that.
    """
    try:
        return _derive(ChatTemplate(template)) if template else None
    except (UserError, TemplateError) as error:
        logging.warning("this export continues text instead of chatting: %s", error)
        return None


def _derive(template: ChatTemplate) -> dict[str, Any]:
    mark: Message = {"role": "user", "content": _MARK}
    first = template.render([mark], add_generation_prompt=True).split(_MARK)
    later = template.render_next([mark]).split(_MARK)
    answer: Message = {"role": "assistant", "content": "answer"}
    for probe in _PROBES:
        message: Message = {"role": "user", "content": probe}
        messages = [message, answer, message, answer, message]
        turns = [probe.join(first), probe.join(later), probe.join(later)]
        expected = f"answer{template.end_of_turn}".join(turns)
        if template.render(messages, add_generation_prompt=True) != expected:
            raise TemplateError("the template changes messages, or the text around them varies")
    end = {"end_of_turn": template.end_of_turn, "stop": template.stop}
    return {"first": first, "next": later, **end}


def stored_weight(weight: np.ndarray, kind: str) -> tuple[np.ndarray, ...]:
    """Return what is stored of a weight: its values, and for int8 the scale of each row.

    Values beyond the range of float16 become the largest one. Vectors and filters, which are
    small, stay float32.
    """
    if kind == "none" or weight.ndim != 2 or weight.shape[1] <= 4:
        return (weight,)
    if kind == "float16":
        largest = np.finfo(np.float16).max
        return (np.clip(weight, -largest, largest).astype(np.float16),)
    scale = np.abs(weight).max(axis=1, keepdims=True).astype(np.float32) / np.float32(127)
    scale[scale == 0] = 1
    return np.rint(weight / scale).astype(np.int8), scale[:, 0]


def rounded_weights(weights: Weights, kind: str) -> dict[str, np.ndarray]:
    """Return the weights as float32 arrays that have been rounded to `kind`."""

    def restored(values: np.ndarray, scale: np.ndarray | None = None) -> np.ndarray:
        values = values.astype(np.float32)
        return values if scale is None else values * scale[:, None]

    return {name: restored(*stored_weight(weight, kind)) for name, weight in weights.items()}
