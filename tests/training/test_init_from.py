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
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.gla_checkpoint import to_fla_config
from simplernn_jax.models.pytorch_weights import named_weights
from simplernn_jax.parallel.named_leaves import in_layout_of
from simplernn_jax.training.loop import train
from simplernn_jax.training.preparation import prepare
from simplernn_jax.training.run import Run


@pytest.fixture(scope="module")
def initial(tmp_path_factory):
    return untrained_run(tmp_path_factory.mktemp("initial"), seed=3)


def fine_tuned(initial, tmp_path, **fields):
    source = write_corpus(tmp_path / "other", seed=1)
    return small_config(**{"source": source, "init_from": str(initial)} | fields)


def assert_starts_with(model, config, tmp_path):
    with Run(config, str(tmp_path / "run")) as run:
        assert run.step == 0
        chex.assert_trees_all_equal(
            jax.tree.leaves(run.state.params),
            jax.tree.leaves(in_layout_of(run.state.params, nnx.state(model, nnx.Param))),
        )
        assert not any(leaf.any() for leaf in jax.tree.leaves(run.state.opt_state) if leaf.ndim)


def assert_rejected(config, tmp_path, problem):
    with pytest.raises(UserError, match=problem):
        train(config, str(tmp_path / "rejected"))


def export(out, model, tokenizer, config):
    with new_folder(str(out)) as folder:
        find_format("safetensors").write(TrainedModel(model, tokenizer, config, "x"), folder)


def defaults(initial, tmp_path):
    """A configuration that gives neither the sizes of a model nor a tokenizer."""
    source = write_corpus(tmp_path / "other", seed=1)
    data = DataConfig(source=source, sequence_length=7, batch_size=2, validation_fraction=0.0)
    train = TrainConfig(steps=1, init_from=str(initial), sample_every=0)
    return Config(data=data, train=train, mesh=MeshConfig(data=1))


@pytest.mark.parametrize("kind", ["run", "export", "weights"])
def test_the_model_and_tokenizer_are_those_of_the_other_run_unless_given(tmp_path, kind):
    fields = {"vocab_size": 17, "num_layers": 2, "key_dim": 6, "tokenizer": "char"}
    initial = untrained_run(tmp_path, precision="bfloat16", **fields)
    model, tokenizer, saved = load_model(str(initial))
    path = {"run": initial, "weights": tmp_path / "model.safetensors"}.get(kind, tmp_path / kind)
    if kind == "export":
        export(path, model, tokenizer, saved)
    elif kind == "weights":
        safetensors.numpy.save_file(named_weights(model), str(path))
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


def test_a_folder_without_a_model_is_rejected(initial, tmp_path):
    config = fine_tuned(initial, tmp_path, init_from="/nonexistent")
    assert_rejected(config, tmp_path, "init_from: no checkpoint in /nonexistent")


PLAIN = {"block": "plain", "num_layers": 2, "key_dim": 5, "value_dim": 7}
STAGES = {"sequence_length": 8, "pipeline": 2}
GLA = {"block": "swiglu", "mixer": "gla", "num_layers": 2, "norm_epsilon": 1e-5}


@pytest.mark.oldest_python
@pytest.mark.parametrize(
    ("kind", "fields", "wrong", "problem"),
    [
        ("run", {}, {"hidden_dim": 16}, "config.model.hidden_dim is 16, checkpoint has 8"),
        ("export", {"fsdp": 2}, {"hidden_dim": 16}, "config.model.hidden_dim is 16"),
        ("gla", GLA, {"num_layers": 1}, "num_layers is 1, checkpoint has 2"),
        ("weights", PLAIN | STAGES, {"vocab_size": 301}, "use the same config.model.vocab_size"),
    ],
)
def test_each_kind_of_model_is_a_start(initial, tmp_path, kind, fields, wrong, problem):
    path = initial
    if kind in ("run", "export"):
        model, tokenizer, config = load_model(str(initial))
    else:
        config = small_config(source=write_corpus(tmp_path / "texts"), seed=3, **fields)
        model = LanguageModel(config.model, rngs=nnx.Rngs(3))
        path = tmp_path / "gla"
        path.mkdir()
        safetensors.numpy.save_file(named_weights(model), str(path / "model.safetensors"))
    if kind == "export":
        path = tmp_path / "export"
        export(path, model, tokenizer, config)
    elif kind == "gla":
        (path / "config.json").write_text(json.dumps(to_fla_config(config.model)))
    elif kind == "weights":
        path /= "model.safetensors"
    assert_starts_with(model, fine_tuned(path, tmp_path, **fields), tmp_path)
    assert_rejected(fine_tuned(path, tmp_path, **fields | wrong), tmp_path, problem)
