"""Reading folders with a model of flash-linear-attention, and refusing others."""

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


def refusal(*arguments, **options):
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
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    message = refusal(tmp_path, 1, weights, tie_word_embeddings=True)
    assert ": lm_head.weight differs from model.embeddings.weight" in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; only 'gla' can be loaded"),
        (
            {"attn": {"layers": [1], "num_heads": 2}},
            'attn is {"layers": [1], "num_heads": 2}; only',
        ),
        ({"use_gv": True}, "use_gv is true; only false is supported"),
        ({"use_gk": False}, "use_gk is false; only true"),
        ({"use_output_gate": False}, "use_output_gate is false; only true"),
        ({"elementwise_affine": False}, "elementwise_affine is false; only true"),
        ({"feature_map": "relu"}, 'feature_map is "relu"; only null'),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; only "swish"'),
        ({"num_kv_heads": 3}, "num_kv_heads is 3; only 1 is supported"),
        ({"attnres_block_size": 2}, "attnres_block_size is 2; only null"),
        ({"clamp_min": 0.5}, "clamp_min is 0.5; only negative values"),
        ({"num_heads": 3}, "model.key_dim=4 is invalid: expected divisible by"),
        ({"num_heads": 0}, "num_heads=0 is invalid: expected at least 1"),
        ({"num_hidden_layers": 10**9}, "num_layers=1000000000 is invalid: expected at most 1024"),
        ({"hidden_size": "8"}, 'hidden_size is "8"; expected int'),
        ({"hidden_size": 10**9}, "hidden_dim=1000000000 is invalid: expected at most"),
        ({"expand_k": float("nan")}, "expand_k is NaN; expected int or float"),
        ({"norm_eps": 0}, "norm_epsilon=0.0 is invalid: expected at least 1e-12"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; expected bool"),
        ({"use_short_conv": True, "conv_size": 1}, "short_convolution=1 is invalid"),
        ({"vocab_size": None}, "vocab_size is null; expected int"),
    ],
)
def test_an_unsupported_setting_is_refused_by_name(tmp_path, settings, message):
    found = refusal(tmp_path, weights=draw_weights(SMALL), **settings)
    assert found.startswith(f"{tmp_path / 'config.json'}: ")
    assert message in found


@pytest.mark.parametrize(
    "settings",
    [
        {"num_kv_heads": 1},
        {"fuse_swiglu": False, "fuse_cross_entropy": False, "use_l2warp": True},
        {"architectures": ["GLAForCausalLM"], "torch_dtype": "bfloat16", "attn_mode": "chunk"},
    ],
)
def test_settings_that_do_not_change_the_model_are_ignored(tmp_path, settings):
    assert load(tmp_path, **settings).config == load(tmp_path).config


Q = "model.layers.1.attn.q_proj.weight"


def test_settings_of_far_more_layers_are_refused_at_once(tmp_path):
    weights = draw_weights(SMALL)
    found = refusal(tmp_path, 1, weights, num_hidden_layers=1000)  # took half an hour
    assert "expected 1,000 layers, found 2" in found


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({Q: None}, f"{Q} missing"),
        ({"model.layers.1.attn.q_proj.bias": (4,)}, "q_proj.bias unexpected"),
        ({"model.layers.2.attn_norm.weight": (8,)}, "layers.2.attn_norm.weight unexpected"),
        ({Q: (8, 4)}, f"{Q} has shape [8, 4]; expected [4, 8]"),
        ({"model.norm.weight": (1, 8)}, "model.norm.weight has shape [1, 8]; expected [8]"),
        ({"model.layers.0.attn.q_conv1d.weight": (4, 1, 4)}, "q_conv1d.weight unexpected"),
    ],
)
def test_a_wrong_tensor_is_refused_by_name(tmp_path, files, change, message):
    weights = draw_weights(SMALL)
    for name, shape in change.items():
        weights.pop(name, None)
        if shape is not None:
            weights[name] = np.zeros(shape, np.float32)
    found = refusal(tmp_path, files, weights)
    assert found.startswith(str(tmp_path))
    assert message in found


def edit_index(folder, change):
    values = json.loads((folder / INDEX).read_text())
    change(values["weight_map"])
    (folder / INDEX).write_text(json.dumps(values))


def test_files_that_an_index_must_not_name(tmp_path):
    load(tmp_path / "model", 3)
    outside = str(save_checkpoint(tmp_path / "other", SMALL, draw_weights(SMALL)))
    for file in ("../other/model.safetensors", f"{outside}/model.safetensors", "..", "", 3, "a\0"):
        load(tmp_path / "model", 3)
        edit_index(tmp_path / "model", lambda names, file=file: names.update({Q: file}))
        with pytest.raises(UserError, match=r"index\.json|no such file") as caught:
            load_gla_checkpoint(str(tmp_path / "model"))
        assert "\n" not in str(caught.value)
    edit_index(tmp_path / "model", lambda names: names.update({Q: "config.json"}))
    with pytest.raises(UserError, match=rf"{Q} is in \"config.json\"; expected a .safetensors"):
        load_gla_checkpoint(str(tmp_path / "model"))


def test_missing_and_corrupted_files(tmp_path):
    folder = str(tmp_path)

    def assert_refused(*parts):
        with pytest.raises(UserError) as caught:
            load_gla_checkpoint(folder)
        assert all(part in str(caught.value) for part in parts), caught.value
        assert "\n" not in str(caught.value)

    assert_refused("config.json: no such file; specify the folder of a GLAForCausalLM")
    load(tmp_path, 3)
    content = (tmp_path / SHARD).read_bytes()
    (tmp_path / SHARD).write_bytes(content[:-9])
    assert_refused(f"{SHARD}: cannot be read")
    (tmp_path / SHARD).unlink()
    assert_refused(f"{SHARD}: no such file; {INDEX} lists 10 tensors in it, such as model.")
    (tmp_path / SHARD).write_bytes(content)
    held = json.loads((tmp_path / INDEX).read_text())["weight_map"][Q]
    assert held != SHARD
    edit_index(tmp_path, lambda names: names.update({Q: SHARD}))
    with pytest.raises(UserError, match=rf"({held}: {Q} is not listed|{SHARD}: {Q} is missing)"):
        load_gla_checkpoint(folder)
    edit_index(tmp_path, lambda names: names.pop(Q))
    assert_refused(f"{held}: {Q} is not listed in {INDEX}")
    (tmp_path / INDEX).write_text('{"weight_map": []}')
    assert_refused(f"{INDEX}: has no weight_map")
    (tmp_path / INDEX).unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    assert_refused("model.safetensors: cannot be read (not a regular file)")
    for text in ("{", "[1]", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        assert_refused("config.json: ")
