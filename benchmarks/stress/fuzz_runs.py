"""Readers of what runs write: configurations, checkpoints, metrics, states and weights."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax import nnx

from simplernn_jax import config as config_lib
from simplernn_jax.checkpoint import manifest
from simplernn_jax.checkpoint.contents import read_texts, saved_quality, saved_step
from simplernn_jax.checkpoint.folder import CheckpointFolder
from simplernn_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from simplernn_jax.data.store_folder import META_FILE, DamagedStore, open_store
from simplernn_jax.data.token_store import prepare_corpus
from simplernn_jax.errors import UserError
from simplernn_jax.inference import generate, load_state, save_state
from simplernn_jax.inference.loading import RUN, read_run, run_json
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.gla_checkpoint import load_gla_checkpoint, to_fla_config
from simplernn_jax.models.named_weights import named_weights
from simplernn_jax.models.pytorch_weights import encode_weights, read_pytorch_weights
from simplernn_jax.training.loss_curve import loss_curves, loss_limits
from simplernn_jax.training.metrics import FILE_NAME, encode, read_metrics

from .fuzz import Reader
from .fuzz_data import BYTES, TEXT, as_text, in_file, void


def small_model(block: str = "residual") -> LanguageModel:
    """Make a small model of bytes."""
    config = ModelConfig(
        vocab_size=BYTES.vocab_size, block=block, num_layers=1, hidden_dim=8, key_dim=8,
        value_dim=8, num_heads=1, mlp_dim=11, tie_embeddings=False,
    )  # fmt: skip
    return LanguageModel(config, rngs=nnx.Rngs(0))


def run_readers(folder: Path) -> list[Reader]:
    """All readers of what runs write; their files are in `folder`."""
    return [*_checkpoint_readers(folder), _corpus_reader(folder), *_model_readers(folder)]


def _checkpoint_readers(folder: Path) -> list[Reader]:
    """Readers of the parts of a checkpoint, and of metrics."""
    checkpoint = folder / "run" / "checkpoints" / "3"
    for item in ("config", "tokenizer", "quality"):
        (checkpoint / item).mkdir(parents=True)
    config = config_lib.to_json(_config(ModelConfig())).encode()
    quality = b'{"step": 3, "validation_loss": 2.5, "predictions": 7}'
    (checkpoint / "config" / "metadata").write_bytes(config)
    (checkpoint / "tokenizer" / "metadata").write_text(json.dumps(BYTES.to_json()))
    (checkpoint / "quality" / "metadata").write_bytes(quality)
    manifest.write_manifest(str(checkpoint))
    run = CheckpointFolder(str(folder / "run"))
    sealed = checkpoint / manifest.MANIFEST_NAME
    original = sealed.read_bytes()

    def verify() -> None:
        is_same = sealed.read_bytes() == original
        assert (run.find_corruption(3) is None) == is_same, "a changed manifest is accepted"
        sealed.write_bytes(original)

    def measured_quality(content: bytes) -> None:
        path = folder / "quality"
        (path / "quality").mkdir(parents=True, exist_ok=True)
        (path / "quality" / "metadata").write_bytes(content)
        saved_quality(str(path))
        saved_step(str(path))

    def texts(content: bytes) -> None:
        path = folder / "texts"
        for item, given in (("config", content), ("tokenizer", b'"{}"')):
            (path / item).mkdir(parents=True, exist_ok=True)
            (path / item / "metadata").write_bytes(given)
        read_texts(str(path))

    def metrics() -> None:
        rows = read_metrics(str(folder))
        curves = loss_curves(rows)
        loss_limits(curves.train, curves.validation)
        for row in rows:
            encode(row)

    rows: list[dict[str, Any]] = [{"step": 1, "kind": "train", "loss": 2.5, "seconds": 0.1}]
    rows += [{"step": 2, "kind": "validation", "loss": None}, {"step": 2, "kind": "sample"}]
    return [
        Reader("configuration", [config], lambda x: void(config_lib.from_json(as_text(x)))),
        Reader("config of a checkpoint", [config], texts),
        Reader("quality of a checkpoint", [quality], measured_quality),
        Reader("manifest", [original], in_file(sealed, verify)),
        Reader(
            "metrics.jsonl",
            [b"".join(map(encode, rows)), json.dumps(rows[0]).encode()],
            in_file(folder / FILE_NAME, metrics),
        ),
    ]


def _corpus_reader(folder: Path) -> Reader:
    source = folder / "corpus.txt"
    source.write_text(TEXT * 9, encoding="utf-8")
    data = DataConfig(source=str(source), split="position")
    prepare_corpus(data, 0, str(folder / "tokens"), tokenizer=BYTES, show_progress=False)
    (record,) = (folder / "tokens").glob(f"*/{META_FILE}")

    def read() -> None:
        try:
            open_store(record.parent)
        except DamagedStore as error:
            raise UserError(str(error)) from error

    return Reader("record of a corpus", [record.read_bytes()], in_file(record, read))


def _model_readers(folder: Path) -> list[Reader]:
    """Readers of models, their settings and states."""
    model = small_model()
    path = str(folder / "state.safetensors")
    state = generate(model, [[1, 2, 3]], max_new_tokens=2).state
    save_state(path, state, model, BYTES)
    original = Path(path).read_bytes()

    def read_state(content: bytes) -> None:
        Path(path).write_bytes(content)
        found = load_state(path, model, BYTES)
        jax.tree.map(np.testing.assert_array_equal, found, state)

    weights = folder / "weights.safetensors"
    safetensors.numpy.save_file(named_weights(model), weights)
    exported, fla = folder / RUN, folder / "fla"
    run = run_json(_config(model.config), BYTES, named_weights(model))
    bare = {name: json.loads(run)[name] for name in ("config", "tokenizer")}
    runs = [run.encode(), json.dumps(bare).encode()]
    fla.mkdir()
    gla = small_model("gla")
    safetensors.numpy.save_file(named_weights(gla), fla / "model.safetensors")
    settings = json.dumps(to_fla_config(gla.config)).encode()

    return [
        Reader("state", [original], read_state),
        Reader("weights", [weights.read_bytes(), encode_weights(named_weights(model))],
               in_file(weights, lambda: read_pytorch_weights(str(weights)))),
        Reader("exported run", runs, in_file(exported, lambda: read_run(str(folder)))),
        Reader("settings of fla", [settings],
               in_file(fla / "config.json", lambda: load_gla_checkpoint(str(fla)))),
    ]  # fmt: skip


def _config(model: ModelConfig) -> Config:
    return Config(model=model, train=TrainConfig(steps=7))
