"""Reading folders with a model of flash-linear-attention, and rejecting others."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from gla_reference import SETTINGS, draw_weights, save_checkpoint

from simplernn_jax.errors import UserError
from simplernn_jax.models import load_gla_checkpoint

SMALL = SETTINGS | {"hidden_size": 8, "vocab_size": 11, "intermediate_size": 7, "num_heads": 1}
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"


def load(folder, files=1, weights=None, **settings):
    settings = SMALL | settings
    weights = draw_weights(settings) if weights is None else weights
    return load_gla_checkpoint(save_checkpoint(folder, settings, weights, files))


def rejection(*arguments, **options):
    """The one line of the error."""
    with pytest.raises(UserError) as caught:
        load(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_half_precision_is_read_as_float32(tmp_path, dtype):
    halves = {name: array.astype(dtype) for name, array in draw_weights(SMALL).items()}
    model = load(tmp_path, weights=halves)
    kernel = model.layers[1].mlp_down.kernel[...]
    assert kernel.dtype == jnp.float32
    expected = halves["model.layers.1.mlp.down_proj.weight"].astype(np.float32)
    np.testing.assert_array_equal(kernel, expected.T)


def test_defaults_are_those_of_fla(tmp_path):
    """The folder of a model of 340M parameters has no weights: its configuration comes first."""
    (tmp_path / "config.json").write_text('{"model_type": "gla", "hidden_size": 1024}')
    with pytest.raises(UserError, match=f"holds neither model.safetensors nor {INDEX}"):
        load_gla_checkpoint(str(tmp_path))
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
        ({"model_type": "llama"}, "model_type is 'llama'; only 'gla' can be loaded"),
        ({"attn": {"layers": [1]}}, "attn is {'layers': [1]}; only None is supported"),
        ({"use_gk": False}, "use_gk is False; only True is supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'swish'"),
        ({"num_kv_heads": 3}, "num_kv_heads differs from num_heads"),
        ({"clamp_min": 0.5}, "clamp_min is 0.5; only negative values"),
        ({"num_heads": 3}, "model.key_dim=4 is invalid: expected divisible by"),
        ({"num_hidden_layers": 10**9}, "num_layers=1000000000 is invalid: expected at most 1024"),
        ({"hidden_size": "8"}, ""),
        ({"expand_k": float("nan")}, "NaN"),
        ({"expand_k": 10**400}, ""),
        ({"tie_word_embeddings": 1}, "tie_embeddings=1 is invalid: expected a value of type bool"),
        ({"use_short_conv": True, "conv_size": 1}, "short_convolution=1 is invalid"),
        ({"vocab_size": None}, "vocab_size=None is invalid: expected a value of type int"),
    ],
)
def test_an_unsupported_setting_is_rejected_by_name(tmp_path, settings, message):
    found = rejection(tmp_path, weights=draw_weights(SMALL), **settings)
    assert found.startswith(f"{tmp_path / 'config.json'}: ")
    assert message in found


def test_settings_that_do_not_change_the_model_are_ignored(tmp_path):
    others = {"num_kv_heads": 1, "fuse_swiglu": False, "torch_dtype": "bfloat16"}
    assert load(tmp_path, **others).config == load(tmp_path).config


Q = "model.layers.1.attn.q_proj.weight"


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({Q: None}, f"{Q} missing"),
        ({"model.layers.2.attn_norm.weight": (8,)}, "layers.2.attn_norm.weight unexpected"),
        ({Q: (8, 4)}, f"{Q} has shape [8, 4]; expected [4, 8]"),
    ],
)
def test_a_wrong_tensor_is_rejected_by_name(tmp_path, files, change, message):
    weights = draw_weights(SMALL)
    for name, shape in change.items():
        weights.pop(name, None)
        if shape is not None:
            weights[name] = np.zeros(shape, np.float32)
    found = rejection(tmp_path, files, weights)
    assert found.startswith(str(tmp_path))
    assert message in found


def test_missing_and_corrupt_files(tmp_path):
    def assert_rejected(message):
        with pytest.raises(UserError, match=message) as caught:
            load_gla_checkpoint(str(tmp_path))
        assert "\n" not in str(caught.value)

    assert_rejected("config.json: no such file; specify the folder of a GLAForCausalLM")
    load(tmp_path, 3)
    content = (tmp_path / SHARD).read_bytes()
    (tmp_path / SHARD).write_bytes(content[:-9])
    assert_rejected(f"{SHARD}: cannot be read")
    (tmp_path / SHARD).unlink()
    assert_rejected(f"{SHARD}: no such file")
    for file in ("../model.safetensors", str(tmp_path / "model.safetensors"), 3, "config.json"):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {Q: file}}))
        assert_rejected("index.json|config.json")
    (tmp_path / INDEX).write_text('{"weight_map": []}')
    assert_rejected(f"{INDEX}: is not an index")
    (tmp_path / INDEX).unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    assert_rejected(r"model.safetensors: cannot be read \(not a regular file\)")
    for text in ("{", "[1]", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        assert_rejected("config.json: ")
