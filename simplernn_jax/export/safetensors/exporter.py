"""``model.safetensors``, ``config.json`` and ``simplernn.json``; `load_model` reads it back."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from simplernn_jax.export.formats import TrainedModel, float32_model, logits_of
from simplernn_jax.inference import generate
from simplernn_jax.inference.loading import RUN, WEIGHTS, load_exported, run_json
from simplernn_jax.models.gla_checkpoint import is_fla, to_fla_config
from simplernn_jax.models.mixers.token_mixer import complete_options
from simplernn_jax.models.named_weights import named_weights
from simplernn_jax.models.pytorch_weights import encode_weights


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
    for name in ("mixer", "mixer_options", "dropout", "precision", "state_precision"):
        del fields[name]
    if "attention" in config.mixers:
        options = complete_options("attention", config).mixer_options
        fields["attention_context"] = options["context"]
    return {"model_type": "simplernn", **fields, "mixers": list(config.mixers), **ids}


def write(trained: TrainedModel, folder: Path) -> None:
    """See `Format.write`."""
    weights = named_weights(trained.model)
    (folder / WEIGHTS).write_bytes(encode_weights(weights))
    text = json.dumps(description(trained), indent=2) + "\n"
    (folder / "config.json").write_text(text, "utf-8")
    (folder / RUN).write_text(run_json(trained.config, trained.tokenizer, weights), "utf-8")


class _Loaded:
    def __init__(self, folder: Path) -> None:
        model, self._tokenizer, _ = load_exported(str(folder))
        self._model = float32_model(model)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return logits_of(self._model, tokens)

    def greedy(self, token: int, count: int) -> list[int]:
        return generate(self._model, [token], max_new_tokens=count).tokens[0].tolist()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).tolist()


load = _Loaded
