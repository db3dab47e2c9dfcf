"""The formats of an export, and what each must offer."""

import dataclasses
import importlib
import importlib.util
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplernn_jax.array_types import ModelState
from simplernn_jax.config import Config
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.errors import UserError, nearest_name, one_line
from simplernn_jax.export import FORMATS
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.gla_checkpoint import is_fla
from simplernn_jax.models.language_model import abstract_model
from simplernn_jax.named_leaves import named_leaves


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
    """License of the weights by its name on the Hugging Face Hub; empty if none was stated."""
    languages: tuple[str, ...] = ()
    """Languages of the text, ISO 639 codes; empty if none was stated."""

    @property
    def name(self) -> str:
        """The name of the run, one printable line."""
        return one_line(last_part(self.workdir))


def last_part(path: str) -> str:
    """Return the last part of a path."""
    return path.rstrip("/").rpartition("/")[2]


class Loaded(Protocol):
    """An exported model, as its users load it."""

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Compute the logits after each of [T] tokens from a zero state: [T, vocab]."""

    def greedy(self, token: int, count: int) -> list[int]:
        """Generate the `count` tokens that follow `token`, each the likeliest."""

    def encode(self, text: str) -> list[int]:
        """Encode `text` without BOS."""


class Format(Protocol):
    """A module of one format."""

    def write(self, trained: TrainedModel, folder: Path) -> None:
        """Write the files into an empty folder.

        Raises:
          UserError: the model or its tokenizer is not supported, or a package is missing.
        """

    def load(self, folder: Path) -> Loaded:
        """Load what `write` has written; called in a process of its own."""


def find_format(name: str) -> Any:
    """Import the module of a format; raises `UserError` for an unknown name."""
    if name not in FORMATS:
        raise UserError(
            f"--format={name}: must be one of {', '.join(FORMATS)}{nearest_name(name, FORMATS)}"
        )
    return importlib.import_module(f"simplernn_jax.export.{name}.exporter")


def check_architecture(format_name: str, model: LanguageModel) -> None:
    """Raise `UserError` for a model that the programs of this format do not have."""
    block, mixers = model.config.block, {*model.config.mixers}
    supported = {"plain": {"simple_rnn"}, "residual": {"simple_rnn", "attention"}}
    if not mixers <= supported.get(block, set()):
        raise UserError(
            f"--format={format_name}: not possible with model.block={block!r} and "
            f"model.mixer={model.config.mixer!r}; use safetensors"
            + (", which flash-linear-attention loads" if is_fla(model.config) else "")
            + ", or stablehlo"
        )


def check_packages(format_name: str, *names: str) -> None:
    """Raise `UserError` that names the first missing package, and how to install it."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            what = "'simplernn_jax[export]'"
            if name == "py_mini_racer":
                name = what = "mini-racer"
            raise UserError(f"--format={format_name} needs the package {name}: pip install {what}")


def float32_model(model: LanguageModel) -> LanguageModel:
    """Return a model with the same parameters that computes in float32."""
    config = dataclasses.replace(model.config, precision="float32", state_precision="float32")
    if config == model.config:
        return model
    return nnx.merge(abstract_model(config)[0], nnx.state(model, nnx.Param))


def logits_of(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """Compute the logits [T, vocab] after each of [T] tokens."""
    return np.asarray(model(jnp.asarray(tokens[None], jnp.int32))[0][0])


def state_by_name(state: ModelState) -> tuple[dict[str, jax.Array], Any]:
    """Flatten the state of a model.

    Returns:
      The arrays by name, such as ``0.mixer``: layer and part; and the function that restores the
      structure.
    """
    structure = jax.tree.structure(state)
    by_name = {name.replace("/", "."): leaf for name, leaf in named_leaves(state).items()}

    def restore(arrays: dict[str, jax.Array]) -> ModelState:
        return jax.tree.unflatten(structure, [arrays[name] for name in by_name])

    return by_name, restore
