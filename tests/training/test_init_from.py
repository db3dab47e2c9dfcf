"""Fine-tuning: a run that starts from the parameters of another one."""

import dataclasses
import json
import shutil

import chex
import jax
import pytest
import safetensors.numpy
from flax import nnx
from small_runs import save_untrained, small_config, untrained_run, write_corpus

from simplernn_jax import load_model
from simplernn_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from simplernn_jax.errors import UserError
from simplernn_jax.export.exporting import new_folder
from simplernn_jax.export.formats import TrainedModel, find_format
from simplernn_jax.models.fla_checkpoint import to_fla_config
from simplernn_jax.models.pytorch_weights import named_weights
from simplernn_jax.parallel.named_leaves import in_layout_of
from simplernn_jax.training.loop import train
from simplernn_jax.training.preparation import prepare
from simplernn_jax.training.run import Run


def make_start(kind, folder, **fields):
    """A model with random parameters: its path, itself, its tokenizer and its configuration."""
    run = untrained_run(folder, **fields)
    model, tokenizer, config = load_model(run)
    path = run if kind == "run" else folder / kind
    if kind == "export":
        with new_folder(str(path)) as out:
            trained = TrainedModel(model, tokenizer, config, "x")
            find_format("safetensors").write(trained, out)
    elif kind != "run":
        path.mkdir()
        safetensors.numpy.save_file(named_weights(model), str(path / "model.safetensors"))
        if kind == "gla":
            (path / "config.json").write_text(json.dumps(to_fla_config(config.model)))
        else:
            path /= "model.safetensors"
    return path, model, tokenizer, config


def fine_tuned(initial, tmp_path, **fields):
    source = write_corpus(tmp_path / "other", seed=1)
    return small_config(**{"source": source, "init_from": str(initial)} | fields)


def assert_rejected(config, tmp_path, problem):
    with pytest.raises(UserError, match=problem):
        train(config, str(tmp_path / "rejected"))


def defaults(initial, tmp_path):
    """A configuration that gives neither the sizes of a model nor a tokenizer."""
    source = write_corpus(tmp_path / "other", seed=1)
    data = DataConfig(source=source, sequence_length=7, batch_size=2, validation_fraction=0.0)
    train = TrainConfig(steps=1, init_from=str(initial), sample_every=0)
    return Config(data=data, train=train, mesh=MeshConfig(data=1))


@pytest.mark.parametrize("kind", ["run", "export", "weights"])
def test_the_model_and_tokenizer_are_those_of_the_other_run_unless_given(tmp_path, kind):
    fields = {"vocab_size": 17, "num_layers": 2, "key_dim": 6, "tokenizer": "char"}
    path, _, tokenizer, saved = make_start(kind, tmp_path, precision="bfloat16", **fields)
    config = defaults(path, tmp_path)
    if kind == "weights":  # which have no tokenizer
        config.data.tokenizer = "char"
    prepared, corpus, _ = prepare(config, str(tmp_path / "run"))
    expected = dataclasses.replace(saved.model, precision="float32")
    if kind == "weights":  # which do not have what a plain layer lacks
        expected = dataclasses.replace(expected, mlp_dim=512, tie_embeddings=False)
    assert (prepared.model, prepared.data.tokenizer) == (expected, "char")
    assert corpus.tokenizer.to_json() == tokenizer.to_json()
    assert config.model == ModelConfig()
    # The same command resumes, and needs the other run no more.
    save_untrained(config, tmp_path / "run")
    if kind != "weights":
        shutil.move(path, tmp_path / "gone")
    assert prepare(config, str(tmp_path / "run"))[0].model == expected


def test_values_that_are_assigned_are_given_even_if_they_are_the_defaults(tmp_path):
    for section, name, problem in (
        ("model", "num_heads", "config.model.num_heads is 4, checkpoint has 1; omit these"),
        ("data", "tokenizer", "config.data.tokenizer is 'byte', checkpoint has 'char'; omit"),
    ):
        config = defaults(untrained_run(tmp_path / name, tokenizer="char"), tmp_path)
        fields = getattr(config, section)
        setattr(fields, name, getattr(fields, name))
        with pytest.raises(UserError, match=problem):
            prepare(config, str(tmp_path / "run"))


def test_a_folder_without_a_model_is_rejected(tmp_path):
    config = fine_tuned("/nonexistent", tmp_path)
    assert_rejected(config, tmp_path, "init_from: no checkpoint in /nonexistent")


PLAIN = {"block": "plain", "num_layers": 2, "key_dim": 5, "value_dim": 7}
STAGES = {"sequence_length": 8, "pipeline": 2}
GLA = {"block": "swiglu", "mixer": "gla", "num_layers": 2, "norm_epsilon": 1e-5}


@pytest.mark.oldest_python
@pytest.mark.parametrize(
    ("kind", "fields", "mesh", "wrong", "problem"),
    [
        ("run", {}, {}, {"hidden_dim": 16}, "config.model.hidden_dim is 16, checkpoint has 8"),
        ("export", {}, {"fsdp": 2}, {"hidden_dim": 16}, "config.model.hidden_dim is 16"),
        ("gla", GLA, {}, {"num_layers": 1}, "num_layers is 1, checkpoint has 2"),
        ("weights", PLAIN, STAGES, {"vocab_size": 301}, "use the same config.model.vocab_size"),
    ],
)
def test_each_kind_of_model_is_a_start(tmp_path, kind, fields, mesh, wrong, problem):
    path, model, *_ = make_start(kind, tmp_path, seed=3, **fields)
    with Run(fine_tuned(path, tmp_path, **fields, **mesh), str(tmp_path / "run")) as run:
        expected = in_layout_of(run.state.params, nnx.state(model, nnx.Param))
        chex.assert_trees_all_equal(*map(jax.tree.leaves, (run.state.params, expected)))
        assert not any(leaf.any() for leaf in jax.tree.leaves(run.state.opt_state))
    assert_rejected(fine_tuned(path, tmp_path, **fields | wrong), tmp_path, problem)
