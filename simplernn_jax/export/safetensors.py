"""``model.safetensors``, ``config.json`` and ``simplernn.json``, which `load_model` reads back."""

from pathlib import Path

import numpy as np

from simplernn_jax.export.formats import (
    TrainedModel,
    compute_logits,
    description,
    float32_model,
    write_json,
)
from simplernn_jax.inference.loading import RUN, WEIGHTS, load_exported, run_json
from simplernn_jax.models.pytorch_weights import encode_weights, named_weights


def write(trained: TrainedModel, folder: Path) -> None:
    """Write the files."""
    weights = named_weights(trained.model)
    (folder / WEIGHTS).write_bytes(encode_weights(weights))
    write_json(folder / "config.json", description(trained))
    (folder / RUN).write_text(run_json(trained.config, trained.tokenizer, weights), "utf-8")


class _Loaded:
    def __init__(self, folder: Path) -> None:
        model, self._tokenizer, _ = load_exported(str(folder))
        self._model = float32_model(model)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return compute_logits(self._model, tokens)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).tolist()


load = _Loaded
