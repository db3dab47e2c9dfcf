"""A model, a corpus and a run as small as they can be, shared by the tests of training."""

import contextlib
import random
import signal

import numpy as np
from flax import nnx

from benchmarks import stress
from simplernn_jax.checkpoint.checkpointer import Checkpointer
from simplernn_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from simplernn_jax.data.batches import Batch
from simplernn_jax.models import LanguageModel
from simplernn_jax.training import loop
from simplernn_jax.training.preparation import prepare

newest_checkpoint = stress.read_checkpoint

HYBRID = {"block": "residual", "num_layers": 2, "mixer": "simple_rnn,attention"}
"""Fields of `small_config`: one layer of each mixer."""


def small_config(block="plain", **fields):
    """A run of one narrow layer; `fields` of any section, by name."""
    config = Config(
        model=ModelConfig(
            block=block, num_layers=1, hidden_dim=8, key_dim=8, value_dim=8, num_heads=1, mlp_dim=11
        ),
        data=DataConfig(batch_size=2, sequence_length=7, validation_fraction=0.0),
        optimizer=OptimizerConfig(warmup_steps=3),
        train=TrainConfig(steps=40, eval_every=0, save_every=0, sample_every=0),
        mesh=MeshConfig(data=1),
    )
    for name, value in fields.items():
        section = next(part for part in vars(config).values() if hasattr(part, name))
        setattr(section, name, value)
    config.model.join_mixers()
    return config


def random_batch(seed, size, length, vocab_size, begins=0.2):
    """A batch whose documents begin at each token with probability `begins`."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, vocab_size, (size, length + 1), np.int32)
    begins = random.random((size, length + 1)) < begins
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=~begins[:, 1:],
        segment_ids=np.cumsum(begins[:, :-1], axis=1, dtype=np.int32),
        reset=begins[:, 0],
    )


def write_corpus(folder, seed=0, documents=7):
    """Write files of a few random letters; return the path of their folder."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        text = "".join(draw.choices("abcdé \n", k=draw.randint(20, 90)))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return str(folder)


def save_untrained(config, workdir, step=1, model_seed=None):
    """Write the checkpoint of an untrained model to `workdir`; return its corpus."""
    config, corpus = prepare(config, str(workdir))
    seed = config.train.seed if model_seed is None else model_seed
    params = nnx.state(LanguageModel(config.model, rngs=nnx.Rngs(seed)), nnx.Param)
    checkpointer = Checkpointer(
        str(workdir), config, corpus.tokenizer.to_json(), keep_last=2, keep_best=0
    )
    checkpointer.save(step, {"params": params}, {"content_hash": corpus.content_hash})
    checkpointer.close()
    return corpus


class SignallingDisplay:
    """Display that keeps the lines of a run and sends SIGTERM after `last_step` steps."""

    def __init__(self, last_step):
        self._last_step, self.lines = last_step, []

    def update(self, step, *_):
        if step == self._last_step - 1:  # read while the next step is under way
            signal.raise_signal(signal.SIGTERM)

    def print_line(self, text):
        self.lines.append(text)


def stop_after(monkeypatch, step):
    """Stop runs by SIGTERM after `step`; return the display, which keeps their lines."""
    display = SignallingDisplay(step)
    monkeypatch.setattr(loop, "open_display", lambda *_: contextlib.nullcontext(display))
    return display
