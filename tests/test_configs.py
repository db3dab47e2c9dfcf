"""The configurations under configs/ and what they promise."""

import importlib.util
from pathlib import Path

import jax
import pytest

from simplernn_jax.config import Config, OptimizerConfig, from_json, to_json, validate
from simplernn_jax.training.gradient import abstract_model

FILES = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.py"))


def load(name):
    (path,) = (file for file in FILES if file.stem == name)
    spec = importlib.util.spec_from_file_location(f"config_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def num_parameters(config):
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_model(config)[1]))


def test_the_promised_ones_are_there():
    assert {"base", "tiny", "seed", "shakespeare"} <= {file.stem for file in FILES}


@pytest.mark.parametrize("name", [file.stem for file in FILES])
def test_is_valid_and_says_how_to_run_it(name):
    module = load(name)
    config = module.get_config()
    assert isinstance(config, Config)
    validate(config)
    assert from_json(to_json(config)) == config
    assert module.get_config() is not config
    assert f"--config configs/{name}.py" in module.__doc__


def test_shakespeare_keeps_to_the_budget():
    config = load("shakespeare").get_config()
    assert num_parameters(config) <= 950_000
    assert config.train.steps * config.data.batch_size * config.data.sequence_length == 1_536_000
    assert config.data.mode == "window"
    assert (config.data.tokenizer, config.data.split) == ("char", "position")
    assert config.data.validation_fraction == pytest.approx(0.1)


def test_seed_is_the_run_of_the_pytorch_project():
    config = load("seed").get_config()
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
