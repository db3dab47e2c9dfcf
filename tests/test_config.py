"""Configurations: validation, JSON in and out, and the files under configs/."""

import ast
import collections
import copy
import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.train_steps import change
from simplernn_jax.cli.config_files import load_config
from simplernn_jax.config import Config, ModelConfig, differing_fields, from_json, to_json, validate
from simplernn_jax.errors import UserError

FOLDER = Path(__file__).resolve().parent.parent / "configs"
FILES = {file.stem: file for file in sorted(FOLDER.glob("*.py"))}


def trainable(**fields):
    """Return the default configuration with 7 steps and `fields` of any section."""
    return change(Config(), **{"steps": 7} | fields)


def load(name):
    return load_config(FILES[name])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.block", "residul", r"one of parallel, plain, .*; did you mean 'residual'\?"),
        ("model.key_dim", 126, "divisible by config.model.num_heads=4"),
        ("model.dropout", 1.0, "below 1"),
        ("model.num_layers", 0, "at least 1"),
        (
            "model.mixer",
            "atention",
            r"one of attention, .*, simple_rnn; did you mean 'attention'\?",
        ),
        ("model.mixer", ["attention", "simple_rnn"], "each of config.model.num_layers=4 layers"),
        ("model.mixer_options", {"method": "scn"}, "method=scn .* one of auto, fused"),
        ("model.mixer_options", {"methd": ""}, "an option of simple_rnn; did you mean 'method'"),
        ("model.mixer_options", {"method": None}, "a dict of names and finite numbers, str"),
        ("data.mode", "strem", "did you mean 'stream'"),
        ("data.source", "", "stdlib, a path"),
        ("data.stride", 257, "at most config.data.sequence_length=256"),
        ("optimizer.learning_rate", float("nan"), "a number that is finite"),
        ("optimizer.epsilon", -1e-8, "at least 1e-30"),
        ("optimizer.beta1", 0.99999999, "at most 0.99999994"),
        ("train.seed", 2**32, "at most 4294967295"),
        ("train.gradient_accumulation", 5, "a divisor of config.data.batch_size=16"),
        ("train.bptt_window", 100, "a divisor of config.data.sequence_length=256"),
        ("train.epochs", 3.0, "exactly one of them"),
        ("train.minutes", -1.0, "at least 0"),
        ("train.epochs", 1e300, "a number that is finite in float32"),
        ("model.mlp_dim", 2**21, "at most 1048576"),
        ("model.hidden_dim", 128.0, "a value of type int"),
        ("model.norm_epsilon", 1e-5, "expected 1e-06 with config.model.block="),
        ("model.norm_epsilon", 0.0, "expected at least 1e-12"),
        ("model.tie_embeddings", 1, "a value of type bool"),
        ("data.loss_mask", "assistant", "expected all without config.data.template"),
    ],
)
def test_a_bad_value_is_rejected_by_name(field, value, message):
    with pytest.raises(UserError, match=message) as caught:
        validate(trainable(**{field.partition(".")[2]: value}))
    assert f"config.{field}=" in str(caught.value)


@pytest.mark.parametrize(
    ("allowed", "added", "message"),
    [
        ({"stride": 64}, {"mode": "stream"}, "data.stride=64 .* 0 with config.data.mode="),
        ({"pipeline": 2}, {"sequence": 4}, "pipeline=2 and .*sequence=4 .* set one of them to 1"),
        (
            {"mixer": "attention"},
            {"mixer_options": {"context": 0}},
            "mixer_options=context=0 is invalid: expected at least 1",
        ),
        ({"mixer": "gla"}, {"mixer_options": {"min_log_gate": 0.1}}, "gate=0.1 .* negative"),
        (
            {"key_dim": 60},
            {"mixer": "attention"},
            "config.model.key_dim=60 .* an even number for each",
        ),
        *(
            ({"early_stopping_patience": 2}, {field: 0 * value}, "patience=2 .* expected 0 if")
            for field, value in (("eval_every", 1), ("validation_fraction", 1.0))
        ),
        *(
            ({"init_from": "x"}, {"tune": tune}, f"tune='{tune}' .*: expected full, state, or lora")
            for tune in ("lora:0", "lora:x", "lora:٣", "lora", "states")
        ),
        ({}, {"tune": "state"}, "expected full without config.train.init_from"),
        ({"mode": "stream"}, {"tune": "state", "init_from": "x"}, "mode='stream' .* window or doc"),
        ({"pipeline": 2}, {"tune": "state", "init_from": "x"}, "mesh.pipeline=2 .*: expected 1"),
    ],
)
def test_fields_that_exclude_each_other(allowed, added, message):
    validate(trainable(**allowed))
    with pytest.raises(UserError, match=message):
        validate(trainable(**allowed, **added))


@pytest.mark.parametrize(
    "mixer", ["simple_rnn,attention,attention", " simple_rnn, attention ,attention"]
)
def test_a_mixer_for_each_layer(mixer):
    names = ["simple_rnn", "attention", "attention"]
    text, listed = (trainable(num_layers=3, mixer=m) for m in (mixer, names))
    assert text.model.mixers == listed.model.mixers == tuple(names)
    validate(text)
    validate(listed)
    assert text == listed == from_json(to_json(listed))
    assert json.loads(to_json(listed))["model"]["mixer"] == ",".join(names)
    assert hash(text.model) == hash(ModelConfig(num_layers=3, mixer=names))
    assert ModelConfig(num_layers=3, mixer="attention").mixers == ("attention",) * 3


def test_json_round_trip():
    config = trainable(source="texts/*.txt", learning_rate=1.5e-3)
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        (["one", "two"], "<2 texts from Python>"),
        (("one",), "<1 text from Python>"),
        (collections.UserList(["one"]), "<1 text from Python>"),
        (lambda: iter(("one", "two")), "<texts from Python>"),
    ],
)
def test_texts_from_python_are_described_in_json_and_kept_in_copies(source, shown):
    config = trainable(source=source)
    validate(config)
    assert config.data.source == json.loads(to_json(config))["data"]["source"] == shown
    assert from_json(to_json(config)) == config
    expected = list(source() if callable(source) else source)
    for data in (config.data, dataclasses.replace(config.data), copy.deepcopy(config.data)):
        assert list(data.source.texts()) == list(data.source.texts()) == expected


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v["model"].update(num_layer=3), "num_layer: no such field; did you mean 'num_l"),
        (lambda v: v["data"].update(batch_size="16"), "batch_size='16' is .* type int"),
        (lambda v: v["optimizer"].update(beta1=10**400), "optimizer.beta1=1000.* is invalid"),
        (lambda v: v.update(model=3), "^model: expected an object"),
    ],
)
def test_other_json_is_rejected(edit, message):
    values = json.loads(to_json(trainable()))
    edit(values)
    with pytest.raises(UserError, match=message):
        from_json(json.dumps(values))


def test_a_field_that_an_earlier_version_did_not_write_has_its_default():
    values = json.loads(to_json(trainable(seed=3, minutes=2.0)))
    del values["train"]["seed"], values["mesh"]
    assert from_json(json.dumps(values)) == trainable(minutes=2.0)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5_000, "[1, 2", "\ud800"])
def test_json_that_cannot_be_decoded_is_rejected(text):
    with pytest.raises(UserError, match=r"invalid JSON .*use an intact copy"):
        from_json(text)


def test_differing_fields_are_named_with_both_values():
    ours, theirs = trainable(), trainable(num_layers=2, beta1=0.8)
    assert differing_fields(ours, trainable()) == {}
    assert differing_fields(ours, theirs) == {
        "model.num_layers": "config.model.num_layers is 4, checkpoint has 2",
        "optimizer.beta1": "config.optimizer.beta1 is 0.9, checkpoint has 0.8",
    }


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_is_valid_and_shows_its_command(name):
    config = load(name)
    validate(config)
    assert from_json(to_json(config)) == config
    assert load(name) is not config
    docstring = ast.get_docstring(ast.parse(FILES[name].read_text(encoding="utf-8")))
    assert f"--config configs/{name}.py" in docstring
