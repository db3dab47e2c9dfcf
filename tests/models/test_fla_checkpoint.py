"""Models against flash-linear-attention itself, whose checkpoints are read."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fla_reference import (
    SETTINGS,
    VARIANTS,
    draw_tokens,
    draw_weights,
    recorded_logits,
    save_checkpoint,
)
from flax import nnx

from simplernn_jax.config import ModelConfig
from simplernn_jax.errors import UserError
from simplernn_jax.models import GLAState, LanguageModel, load_fla_checkpoint
from simplernn_jax.ops.segments import reset_state

# Of the largest logit: float32 matmuls of a Xeon with AMX come to 3.2e-6 with gla, of a Zen 3 to
# 3.1e-6; mamba2 and gated_deltanet come to 5.4e-6 on the Xeon.
TOLERANCE = 1e-5
CONFIG = ModelConfig(
    block="swiglu",
    mixer="gla",
    vocab_size=29,
    num_layers=2,
    hidden_dim=14,
    key_dim=6,
    value_dim=10,
    num_heads=2,
    mlp_dim=17,
    mixer_options={"short_convolution": 4},
)

call = nnx.jit(lambda model, *arguments: model(*arguments))


@functools.cache
def loaded(variant, folder_of):
    """The model of one of `VARIANTS`, with the weights in one file or three."""
    settings = SETTINGS | VARIANTS[variant]
    files = 1 + 2 * (variant == "plain")
    return load_fla_checkpoint(
        save_checkpoint(folder_of(variant), settings, draw_weights(settings), files)
    )


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return lambda variant: root / variant


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_fla(variant, folder_of):
    logits, state = call(loaded(variant, folder_of), draw_tokens())
    chex.assert_type(logits, jnp.float32)
    expected = recorded_logits(variant)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
    if variant.split(",")[0] in ("plain", "convolutions", "clamped"):
        has_convolutions = "convolutions" in variant
        assert all((layer.convolutions is not None) == has_convolutions for layer in state)


def test_the_state_continues_and_segments_reset_it(folder_of):
    model, tokens = loaded("convolutions, tied", folder_of), draw_tokens()
    whole = recorded_logits("convolutions, tied")
    limit = TOLERANCE * np.abs(whole).max()
    first, state = call(model, tokens[:, :2])
    rest, _ = call(model, tokens[:, 2:], state)
    joined = np.concatenate([first, rest], axis=1)
    np.testing.assert_allclose(joined, whole, rtol=0, atol=limit)
    # The second document begins within the state, the third within a convolution's reach.
    _, state = call(model, tokens[:, :5])
    ids = np.repeat([3, 4, 3], [6, 2, 6])[None] + np.zeros((2, 1), np.int32)
    logits, final = call(model, tokens[:, 5:], state, ids.astype(np.int32))
    documents = [whole[:, 5:11], *(call(model, tokens[:, a:b])[0] for a, b in ((11, 13), (13, 19)))]
    np.testing.assert_allclose(logits, np.concatenate(documents, axis=1), rtol=0, atol=limit)
    alone = call(model, tokens[:, 13:])[1]
    chex.assert_trees_all_close(final, alone, rtol=0, atol=1e-4)
    reset = reset_state(state, np.array([True, False]))
    np.testing.assert_allclose(
        call(model, tokens[:1, 13:])[0], call(model, tokens[:, 13:], reset)[0][:1], atol=limit
    )


def test_initial_values():
    """Those of flash-linear-attention; but convolutions pass the current token alone."""
    config = dataclasses.replace(CONFIG, vocab_size=500, hidden_dim=128, key_dim=64)
    config.mixer_options["short_convolution"] = 3
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    mixer = model.layers[0].mixer
    for kernel in (model.embedding.embedding, mixer.query_proj.kernel, mixer.gate_up_proj.kernel):
        assert abs(np.std(kernel[...]) / 0.02 - 1) < 0.05
    assert not mixer.gate_up_proj.bias[...].any()
    np.testing.assert_array_equal(mixer.convolutions.key.weights[...][:, 0], [1, 0, 0])


def test_dropout_is_reproducible_and_none_without_a_key():
    model = LanguageModel(ModelConfig(**{**vars(CONFIG), "dropout": 0.4}), rngs=nnx.Rngs(0))
    tokens = jnp.asarray(draw_tokens() % 29)
    hidden = nnx.jit(lambda model, tokens, key: model.hidden_states(tokens, dropout_key=key)[0])
    one, again, other = (hidden(model, tokens, jax.random.key(seed)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(one, again)
    assert not np.allclose(one, other)
    assert not np.allclose(one, hidden(model, tokens, None))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda s: s.recurrent, "state: expected a GLAState"),
        (lambda s: s._replace(recurrent=s.recurrent[:, :1]), r"initial_state: expected \[B, H"),
    ],
)
def test_the_state_of_another_layer_is_rejected(state, message):
    mixer = LanguageModel(CONFIG, rngs=nnx.Rngs(0)).layers[0].mixer
    x = jnp.ones((2, 3, 14))
    assert isinstance(mixer(x)[1], GLAState)
    with pytest.raises((TypeError, ValueError), match=message):
        mixer(x, state(mixer.initial_state(2)))


SMALL = SETTINGS | {"hidden_size": 8, "vocab_size": 11, "intermediate_size": 7, "num_heads": 1}
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"


def load(folder, files=1, weights=None, **settings):
    settings = SMALL | settings
    weights = draw_weights(settings) if weights is None else weights
    return load_fla_checkpoint(save_checkpoint(folder, settings, weights, files))


def rejection(*arguments, **options):
    """The one line of the error."""
    with pytest.raises(UserError) as caught:
        load(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_those_of_fla(tmp_path):
    """The folder of a model of 340M parameters has no weights: its configuration comes first."""
    (tmp_path / "config.json").write_text('{"model_type": "gla", "hidden_size": 1024}')
    with pytest.raises(UserError, match=f"holds neither model.safetensors nor {INDEX}"):
        load_fla_checkpoint(str(tmp_path))
    weights = draw_weights(SMALL | {"intermediate_size": 256})
    config = load(tmp_path, 1, weights, intermediate_size=None, hidden_ratio=5).config
    assert config.mlp_dim == 256  # int(8 * 5 * 2 / 3) = 26, to the next multiple of 256
    assert (config.key_dim, config.value_dim, config.norm_epsilon) == (4, 8, 1e-6)
    assert (config.tie_embeddings, config.mixer_options) == (False, {})


def test_a_tied_head_may_be_in_the_file_if_it_is_the_embedding(tmp_path):
    weights = draw_weights(SMALL)
    weights["lm_head.weight"] = weights["model.embeddings.weight"]
    assert load(tmp_path, 2, weights, tie_word_embeddings=True).head is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; only gla, retnet, hgrn2, mamba2, "),
        ({"model_type": "mamba2", "n_groups": 2}, "n_groups is 2; only 1 is supported"),
        ({"model_type": "mamba2", "num_heads": 3}, "head_dim and num_heads do not fit 16"),
        ({"model_type": "gated_deltanet", "num_v_heads": 4}, "num_v_heads differs from num_heads"),
        ({"attn": {"layers": [1]}}, "attn is {'layers': [1]}; only None is supported"),
        ({"num_kv_heads": 3}, "num_kv_heads differs from num_heads"),
        ({"clamp_min": 0.5}, "clamp_min is 0.5; only negative values"),
        ({"num_heads": 3}, "model.key_dim=4 is invalid: expected divisible by"),
        ({"hidden_size": "8"}, ""),
        ({"expand_k": float("nan")}, "NaN"),
        ({"use_short_conv": True, "conv_size": 1}, "short_convolution=1 is invalid"),
    ],
)
def test_an_unsupported_setting_is_rejected_by_name(tmp_path, settings, message):
    found = rejection(tmp_path, weights=draw_weights(SMALL), **settings)
    assert found.startswith(f"{tmp_path / 'config.json'}: ")
    assert message in found


def test_settings_that_do_not_change_the_model_are_ignored(tmp_path):
    others = {"num_kv_heads": 1, "fuse_swiglu": False, "torch_dtype": "bfloat16"}
    assert load(tmp_path, **others).config == load(tmp_path).config


def test_missing_and_corrupt_files(tmp_path):
    def assert_rejected(message):
        with pytest.raises(UserError, match=message) as caught:
            load_fla_checkpoint(str(tmp_path))
        assert "\n" not in str(caught.value)

    assert_rejected("config.json: cannot be read")
    load(tmp_path, 3)
    content = (tmp_path / SHARD).read_bytes()
    (tmp_path / SHARD).write_bytes(content[:-9])
    assert_rejected(f"{SHARD}: cannot be read")
    (tmp_path / SHARD).unlink()
    assert_rejected(f"{SHARD}: no such file")
    for file in ("../model.safetensors", str(tmp_path / "model.safetensors")):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": file}}))
        assert_rejected("index.json")
    (tmp_path / INDEX).write_text('{"weight_map": []}')
    assert_rejected(f"{INDEX}: is not an index")
    (tmp_path / INDEX).unlink()
    (tmp_path / "config.json").write_text("[1]")
    assert_rejected("config.json: ")
