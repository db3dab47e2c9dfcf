"""The configurations under configs/ and what they promise."""

import ast
from pathlib import Path

import jax
import pytest

from simplernn_jax.config import Config, OptimizerConfig, from_json, to_json, validate
from simplernn_jax.config_flag import load_config
from simplernn_jax.training.gradient import abstract_model

FOLDER = Path(__file__).resolve().parent.parent / "configs"
FILES = {file.stem: file for file in sorted(FOLDER.glob("*.py"))}


def load(name):
    return load_config(FILES[name])


def num_parameters(config):
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_model(config)[1]))


def test_the_promised_ones_are_there():
    assert {"base", "tiny", "seed", "shakespeare", "attention"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_is_valid_and_says_how_to_run_it(name):
    config = load(name)
    assert isinstance(config, Config)
    validate(config)
    assert from_json(to_json(config)) == config
    assert load(name) is not config
    docstring = ast.get_docstring(ast.parse(FILES[name].read_text(encoding="utf-8")))
    assert f"--config configs/{name}.py" in docstring


def test_attention_is_base_with_another_mixer_and_as_many_parameters():
    base, attention = load("base"), load("attention")
    assert (base.model.mixer, attention.model.mixer) == ("simple_rnn", "attention")
    assert num_parameters(attention) == pytest.approx(num_parameters(base), rel=0.02)
    attention.model.mixer, attention.model.mlp_dim = base.model.mixer, base.model.mlp_dim
    assert attention == base


def test_shakespeare_keeps_to_the_budget():
    config = load("shakespeare")
    assert num_parameters(config) <= 950_000
    assert config.train.steps * config.data.batch_size * config.data.sequence_length == 1_536_000
    assert config.data.mode == "window"
    assert (config.data.tokenizer, config.data.split) == ("char", "position")
    assert config.data.validation_fraction == pytest.approx(0.1)


def test_seed_is_the_run_of_the_pytorch_project():
    config = load("seed")
    model = config.model
    assert (model.block, model.num_layers, model.num_heads) == ("plain", 2, 1)
    assert (model.hidden_dim, model.key_dim, model.value_dim) == (128, 128, 128)
    assert (config.data.mode, config.data.field, config.data.batch_size) == ("document", "bot", 2)
    assert config.train.epochs == 20
    # torch.optim.Adam with a learning rate of 1e-3 and nothing else.
    assert config.optimizer == OptimizerConfig(
        learning_rate=1e-3,
        warmup_steps=0,
        final_learning_rate=1.0,
        weight_decay=0.0,
        beta1=0.9,
        beta2=0.999,
        epsilon=1e-8,
        clip_norm=0.0,
    )
