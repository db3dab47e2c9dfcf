"""A model, a corpus and a run as small as they can be, shared by the tests of training."""

import contextlib
import random
import signal

import numpy as np
from corpus_files import records, write
from flax import nnx

from benchmarks import serving
from benchmarks.stress import runs
from benchmarks.train_steps import change, random_documents
from simplernn_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from simplernn_jax.models import LanguageModel
from simplernn_jax.training import loop

newest_checkpoint = runs.read_checkpoint
save_untrained = serving.save_untrained

HYBRID = {"block": "residual", "num_layers": 2, "mixer": "simple_rnn,attention"}
"""Fields of `small_config`: one layer of each mixer."""


class Options(dict):
    """Options of mixers that `functools.cache` can take."""

    def __hash__(self):
        return hash(tuple(self.items()))


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
    change(config, **fields)
    return config


def small_model(block="plain", **fields):
    """The model of `small_config`, with random parameters."""
    return LanguageModel(small_config(block, **fields).model, rngs=nnx.Rngs(0))


def random_batch(seed, size, length, vocab_size, begins=0.2):
    """A batch whose documents begin at each token with probability `begins`."""
    return random_documents(np.random.default_rng(seed), size, length, vocab_size, begins)


def write_corpus(folder, seed=0, documents=7):
    """Write files of a few random letters; return the path of their folder."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        text = "".join(draw.choices("abcdé \n", k=draw.randint(20, 90)))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return str(folder)


def untrained_run(folder, **fields):
    """Write a corpus and the checkpoint of an untrained model; return its workdir."""
    config = small_config(source=write_corpus(folder / "texts"), **fields)
    save_untrained(config, folder / "untrained")
    return folder / "untrained"


def save_untrained_chat(folder, **fields):
    """Write the checkpoint of an untrained chat model; return its workdir."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    source = write(folder / "a.jsonl", records(*[{"messages": chat}] * 3))
    save_untrained(small_config(source=str(source), template="roles", **fields), folder / "chat")
    return folder / "chat"


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
