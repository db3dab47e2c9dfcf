"""Models, corpora and runs as small as they can be, and train steps on simulated devices."""

import contextlib
import math
import random
import signal

import chex
import jax
import numpy as np
from flax import nnx
from small_data import bpe_of, char_tokenizer, pretrained, records, write

from benchmarks import serving
from benchmarks.stress import runs
from benchmarks.stress.fuzz import TEXT, byte_level_json
from benchmarks.train_steps import change, random_documents, take_steps
from simplernn_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from simplernn_jax.data import load_tokenizer
from simplernn_jax.data.tokenizer import InfillingTokenizer
from simplernn_jax.export.formats import TrainedModel
from simplernn_jax.models import LanguageModel
from simplernn_jax.parallel.mesh import make_mesh
from simplernn_jax.parallel.named_leaves import in_layout_of
from simplernn_jax.training import loop, report
from simplernn_jax.training.train_step import init_train_state, make_train_step

newest_checkpoint = runs.read_checkpoint
save_untrained = serving.save_untrained
report.SAMPLES = 0  # in most tests: a program to compile for every run

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


def mesh_of(**sizes):
    """A mesh of as many devices as `sizes` make up."""
    sizes = {"data": 1} | sizes
    return make_mesh(MeshConfig(**sizes), jax.devices("cpu")[: math.prod(sizes.values())])


def distance(ours, reference):
    """Norm of all differences between two trees, relative to the norm of `reference`."""
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, reference)
    ours, reference = (
        np.concatenate([np.ravel(np.float64(leaf)) for leaf in jax.tree.leaves(tree)])
        for tree in (ours, reference)
    )
    return np.linalg.norm(ours - reference) / max(np.linalg.norm(reference), np.finfo(float).tiny)


def first_state(config, optimizer):
    """The state before the first step, as numpy arrays; floats are in the model's precision."""
    state = jax.device_get(jax.jit(lambda: init_train_state(config, optimizer))())
    wide = {np.dtype("float32"): config.model.precision}
    return jax.tree.map(lambda x: x.astype(wide.get(x.dtype, x.dtype)), state)


def compile_step(config, optimizer, mesh, state, batch):
    """The train step, and `state` as arrays of the layout that it takes."""
    shapes = jax.eval_shape(lambda: init_train_state(config, optimizer))
    state = in_layout_of(shapes, state)
    step = make_train_step(config, optimizer, mesh).lower(state, batch).compile()
    return step, jax.device_put(state, step.input_shardings[0][0])


def run_steps(step, state, batches):
    """Losses, and the state after the last batch as numpy arrays."""
    (states, on_mesh), _ = step.input_shardings
    copy = jax.device_put(jax.tree.map(np.array, jax.device_get(state)), states)  # to donate
    placed = (jax.device_put(batch, on_mesh) for batch in batches)
    state, metrics = take_steps(step, copy, placed)
    return [float(of_step.loss) for of_step in metrics], jax.device_get(state)


MODELS = {
    "plain": {
        **{"block": "plain", "num_layers": 2, "num_heads": 1, "hidden_dim": 8},
        **{"key_dim": 5, "value_dim": 7},
    },
    "parallel": {"num_layers": 1, "tie_embeddings": False},
    "hybrid": {
        **{"block": "residual", "num_layers": 2, "mixer": "simple_rnn,attention"},
        "mixer_options": {"context": 13},
    },
}
"""Fields of the model by the name of a case."""

GLA = {
    **{"block": "swiglu", "mixer": "gla", "mixer_options": {"short_convolution": 3}},
    **{"num_layers": 2, "norm_epsilon": 1e-4},
}
TOKENIZERS = {
    "byte": lambda: load_tokenizer("byte", None),
    "char": lambda: char_tokenizer("".join(sorted(set(TEXT + "abc<|eos>")))),
    "bpe": lambda: pretrained(byte_level_json("<s>", "</s>")),
    "trained": lambda: bpe_of(TEXT),
    "fim": lambda: InfillingTokenizer(TOKENIZERS["char"]()),
}


SIZES = {"hidden_dim": 8, "key_dim": 12, "value_dim": 18, "num_heads": 3, "mlp_dim": 11}


def trained(fields, tokenizer=None, workdir="runs/small", **data):
    """A model with random parameters, as it is exported."""
    tokenizer = tokenizer or load_tokenizer("byte", None)
    model = ModelConfig(**{**SIZES, "num_layers": 1, **fields})
    model.vocab_size = tokenizer.vocab_size
    config = Config(model=model)
    config.train.steps = 1
    for name, value in data.items():
        setattr(config.data, name, value)
    result = LanguageModel(model, rngs=nnx.Rngs(0))
    for layer in result.layers:
        if hasattr(layer.mixer, "cell"):
            bias = layer.mixer.cell.gate_proj.bias
            bias[...] = bias[...].at[0].set(-200.0)  # a gate of 0, whose logarithm is finite
    return TrainedModel(result, tokenizer, config, workdir)
