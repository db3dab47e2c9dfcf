"""Configurations: JSON in and out, and refusals that say what is allowed."""

import json

import pytest

from simplernn_jax.config import Config, differing_fields, from_json, to_json, validate
from simplernn_jax.errors import UserError


def trainable():
    config = Config()
    config.train.steps = 7
    return config


def test_a_stride_is_of_windows():
    config = trainable()
    config.data.mode, config.data.stride = "stream", 64
    with pytest.raises(UserError, match=r"data\.stride=64 .* 0 where data\.mode='stream'"):
        validate(config)


def test_json_round_trip():
    config = trainable()
    config.data.source = "texts/*.txt"
    config.optimizer.learning_rate = 1.5e-3
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("model", "block", "residul", r"one of plain, residual \(did you mean 'residual'\?\)"),
        ("model", "key_dim", 126, "divisible by model.num_heads=4"),
        ("model", "dropout", 1.0, r"in \[0, 1\)"),
        ("model", "num_layers", 0, "at least 1"),
        ("model", "mixer", "atention", r"simple_rnn, attention \(did you mean 'attention'\?\)"),
        ("model", "mixer", "", "one of simple_rnn, attention"),
        ("model", "mixer", ["attention", "rnn", "attention", "attention"], "simple_rnn, attention"),
        ("model", "mixer", ["attention", "simple_rnn"], "each of model.num_layers=4 layers"),
        ("model", "attention_context", 0, "at least 1"),
        ("data", "mode", "strem", "did you mean 'stream'"),
        ("data", "validation_fraction", -0.1, r"in \[0, 1\)"),
        ("data", "source", "", "stdlib, a path"),
        ("data", "stride", 257, "at most data.sequence_length=256"),
        ("optimizer", "learning_rate", float("nan"), "a finite number"),
        ("optimizer", "epsilon", 0.0, "positive"),
        ("optimizer", "name", "moun", "did you mean 'muon'"),
        ("train", "seed", 2**32, r"in \[0, 2\*\*32\)"),
        ("train", "keep_last", 1, "at least 2"),
        ("train", "gradient_accumulation", 5, "a divisor of data.batch_size=16"),
        ("train", "backward_window", 100, "a divisor of data.sequence_length=256"),
        ("train", "backward", "exat", "did you mean 'exact'"),
        ("train", "remat", "blocks", "did you mean 'block'"),
        ("train", "epochs", 3.0, "exactly one of them"),
        ("train", "steps", 0, "exactly one of them"),
        ("train", "steps", 10**30, r"below 2\*\*31"),
        ("train", "epochs", 1e300, "a finite number of float32"),
        ("train", "sample_tokens", 10**9, "at most 1048576"),
        ("model", "num_layers", 10**5, "at most 1024"),
        ("model", "vocab_size", 10**12, r"below 2\*\*31"),
        ("model", "mlp_dim", 2**21, "at most 1048576"),
        ("model", "hidden_dim", 128.0, "of type int"),
        ("model", "tie_embeddings", 1, "of type bool"),
        ("data", "cache_dir", "~nobody-x/tokens", "of a user that exists"),
        ("mesh", "data", 10**30, r"below 2\*\*31"),
    ],
)
def test_a_bad_value_is_refused_by_name(section, field, value, message):
    config = trainable()
    setattr(getattr(config, section), field, value)
    with pytest.raises(UserError, match=message) as caught:
        validate(config)
    assert f"--config.{section}.{field}" in str(caught.value)


def test_time_is_divided_by_one_axis_of_the_mesh():
    config = trainable()
    config.mesh.stage, config.mesh.sequence = 2, 4
    with pytest.raises(UserError, match=r"mesh\.stage=2 and .*sequence=4 .* set one of them to 1"):
        validate(config)


def test_stretches_of_time_need_an_exact_state():
    config = trainable()
    config.mesh.sequence, config.model.state_precision = 2, "bfloat16"
    with pytest.raises(UserError, match=r"state_precision=bfloat16 and .*mesh\.sequence=2"):
        validate(config)


@pytest.mark.parametrize(
    "mixer", ["simple_rnn,attention,attention", " simple_rnn, attention ,attention"]
)
def test_a_mixer_for_each_layer(mixer):
    config, of_a_list = trainable(), trainable()
    config.model.num_layers = of_a_list.model.num_layers = 3
    config.model.mixer = mixer
    of_a_list.model.mixer = ["simple_rnn", "attention", "attention"]
    validate(config)
    validate(of_a_list)
    assert config == of_a_list == from_json(to_json(of_a_list))
    assert hash(config.model) == hash(of_a_list.model)
    assert config.model.mixers == ("simple_rnn", "attention", "attention")
    config.model.mixer = "attention"
    assert config.model.mixers == ("attention",) * 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block": "plain"}, "--config.model.mixer='attention' .* model.block='plain'"),
        ({"key_dim": 60}, "--config.model.key_dim=60 .* an even number for each"),
    ],
)
def test_what_attention_cannot_do_is_refused(fields, message):
    config = trainable()
    for name, value in fields.items():
        setattr(config.model, name, value)
    validate(config)
    config.model.mixer = "attention"
    with pytest.raises(UserError, match=message):
        validate(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["model"].update(num_layer=3), "num_layer: no such field; did you mean 'num_l"),
        (lambda v: v["train"].pop("seed"), r"config\.train\.seed: missing"),
        (lambda v: v["data"].update(batch_size="16"), "batch_size='16': expected int"),
        (lambda v: v.update(model=3), "config.model: expected an object"),
    ],
)
def test_json_of_another_shape_is_refused(change, message):
    values = json.loads(to_json(trainable()))
    change(values)
    with pytest.raises(UserError, match=message):
        from_json(json.dumps(values))


def test_a_field_that_older_files_lack_has_its_default():
    values = json.loads(to_json(trainable()))
    del values["train"]["stop_after_worse"]
    assert from_json(json.dumps(values)) == trainable()


@pytest.mark.parametrize(
    ("section", "name"), [("train", "eval_every"), ("data", "validation_fraction")]
)
def test_early_stopping_needs_evaluations(section, name):
    config = trainable()
    config.train.stop_after_worse = 2
    validate(config)
    setattr(getattr(config, section), name, 0)
    with pytest.raises(UserError, match="stop_after_worse=2 is not possible: it must be 0 where"):
        validate(config)


def test_text_that_is_not_json_is_refused():
    with pytest.raises(UserError, match="not JSON"):
        from_json("{")


def test_differing_fields_are_named_with_both_values():
    ours, theirs = trainable(), trainable()
    assert differing_fields(ours.model, theirs.model) == []
    theirs.model.num_layers = 2
    theirs.model.tie_embeddings = False
    assert differing_fields(ours.model, theirs.model) == [
        "num_layers: 4 here, 2 there",
        "tie_embeddings: True here, False there",
    ]
