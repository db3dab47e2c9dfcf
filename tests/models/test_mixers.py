"""Mixers in the whole program; `decay` is the example of docs/architecture.md, from outside."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from processes import ROOT
from small_runs import (
    compile_step,
    distance,
    first_state,
    mesh_of,
    newest_checkpoint,
    random_batch,
    run_steps,
    small_config,
    stop_after,
    write_corpus,
)

from configs import gla_340m
from simplernn_jax import load_model
from simplernn_jax.analysis import find_mixers
from simplernn_jax.analysis.decomposition import decompose_layers, is_exact
from simplernn_jax.config import validate
from simplernn_jax.errors import UserError
from simplernn_jax.export.formats import check_architecture
from simplernn_jax.inference import generate, generate_text
from simplernn_jax.inference.sampling import Sampling
from simplernn_jax.models import LanguageModel, register_mixer
from simplernn_jax.models.language_model import abstract_model, check_mesh
from simplernn_jax.models.mixers import token_mixer
from simplernn_jax.models.mixers.token_mixer import find_mixer, load_plugin
from simplernn_jax.parallel.mesh import check_fits
from simplernn_jax.parallel.named_leaves import in_layout_of
from simplernn_jax.serving.jobs import Job, NewTokens
from simplernn_jax.serving.scheduler import Scheduler
from simplernn_jax.training.loop import train
from simplernn_jax.training.optimizer import make_optimizer

SIZES = {
    "num_layers": 2,
    "hidden_dim": 8,
    "key_dim": 12,
    "value_dim": 20,
    "num_heads": 2,
    "mlp_dim": 14,
    "mixer": "gla",
    "mixer_options": {"short_convolution": 4, "min_log_gate": -0.06},
    "norm_epsilon": 1e-5,
}
OTHERS = {
    "retnet": {"mixer_options": {}},
    "hgrn2": {"mixer_options": {}},
    "mamba2": {"mixer_options": {"short_convolution": 3}, "mlp_dim": 0},
    "gated_delta_net": {"mixer_options": {"short_convolution": 2}},
}
MESHES = [
    ("gla", "fsdp 2, sequence 2, tensor 2"),
    ("gla", "pipeline 2, tensor 2"),
    ("retnet", "sequence 2, tensor 2"),
    ("hgrn2", "fsdp 2, tensor 2"),
    ("mamba2", "fsdp 2, sequence 2, tensor 2"),
    ("gated_delta_net", "pipeline 2, tensor 2"),
    ("gated_delta_net", "data 2, fsdp 2"),
    ("decay", "data 2, fsdp 2"),
]
DECAY = {
    "mixer": "decay",
    "mixer_options": {"half_life": 3.0},
    "hidden_dim": 8,
    "mlp_dim": 14,
    "num_layers": 2,
}
BATCH, LENGTH, VOCAB = 4, 24, 12


@pytest.fixture(scope="module", autouse=True)
def plugin(tmp_path_factory):
    """The example as a file, which this process has imported; its mixers end with these tests."""
    path = tmp_path_factory.mktemp("plugin") / "decay.py"
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    path.write_text(re.search(r"<!-- file: decay.py -->\n```python\n(.*?)```", page, re.DOTALL)[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_mixer, "_registry", dict(token_mixer._registry))
        load_plugin(path)
        yield path


@pytest.fixture(autouse=True)
def usual_promotion(request):
    """JAX as users have it, for the code of the example."""
    if "decay" not in request.node.name:
        yield
        return
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def config_of(mixer, **fields):
    if mixer != "decay":
        others = {"mixer": mixer} | OTHERS.get(mixer, {})
        return small_config("swiglu", **SIZES | others | fields)
    return small_config("parallel", **DECAY | fields)


gla_config = functools.partial(config_of, "gla")


def make_batch(seed):
    """The first sequence continues from batch to batch; documents begin ever more often below."""
    return random_batch(seed, BATCH, LENGTH, VOCAB, np.linspace(0, 0.3, BATCH)[:, None])


def axes_of(mesh_name):
    return {axis: int(size) for axis, size in map(str.split, mesh_name.split(", "))}


@functools.cache
def three_steps(mixer, mesh_name=None):
    """Losses and last state of three steps in float64 with a carried state."""
    sizes = {"vocab_size": VOCAB, "batch_size": BATCH, "sequence_length": LENGTH}
    sizes_of_mesh = {} if mesh_name is None else axes_of(mesh_name)
    stages = sizes_of_mesh.get("pipeline", 1)
    fields = {"mode": "stream", "learning_rate": 1e-3, "pipeline": stages}
    config = config_of(mixer, **sizes | fields)
    config.model.precision = "float64"  # for tests: `validate` knows nothing of it
    mesh = mesh_of(**sizes_of_mesh) if sizes_of_mesh else None
    optimizer = make_optimizer(config.optimizer, 100, mesh)
    config.mesh.pipeline = 1
    state = first_state(config, optimizer)
    config.mesh.pipeline = stages
    compiled = compile_step(config, optimizer, mesh, state, make_batch(0))
    return run_steps(*compiled, map(make_batch, range(3)))


@pytest.mark.parametrize(("mixer", "mesh_name"), MESHES)
def test_steps_on_a_mesh_equal_one_device(mixer, mesh_name):
    with jax.enable_x64(True):
        losses, state = three_steps(mixer, mesh_name)
        expected_losses, expected = three_steps(mixer)
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-11)
        assert len(set(losses)) == 3
        state = in_layout_of(expected, state)
        for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
            assert distance(one, np.asarray(other)) <= 1e-10


def test_a_convolution_wider_than_a_sequence_shard_is_refused():
    config = gla_config(mixer_options={"short_convolution": 9}, sequence_length=24)
    check_fits(config, mesh_of(sequence=3))
    message = r"leaves each device of sequence 4 a shard of 6, .* needs 8 tokens"
    with pytest.raises(UserError, match=message):
        check_fits(config, mesh_of(sequence=4))


def test_the_rank_of_the_gates_is_sharded_over_fsdp():
    message = (
        r"mesh\.fsdp=3 does not divide 16, a size of .* layers\.0\.mixer\.gate_up_proj\.kernel"
    )
    with pytest.raises(UserError, match=message):
        check_mesh(gla_config(hidden_dim=9).model, mesh_of(fsdp=3))


def test_a_mixer_rejects_the_mesh_axes_that_it_does_not_support():
    for axis in ("tensor", "sequence", "pipeline"):
        with pytest.raises(
            UserError, match=rf"mesh\.{axis}=2 is not supported by the mixer 'decay'"
        ):
            check_mesh(config_of("decay").model, mesh_of(**{axis: 2}))


@pytest.mark.oldest_python
@pytest.mark.parametrize(
    ("mixer", "carried"),
    [("gla", "convolutions/key"), ("gated_delta_net", "recurrent"), ("decay", "mixer")],
)
def test_a_run_resumes_bit_exactly_and_generates(tmp_path, monkeypatch, plugin, mixer, carried):
    source = write_corpus(tmp_path / "text")
    config = config_of(mixer, source=source, mode="stream", save_every=3, steps=8)
    config.model.num_layers = 1
    whole = train(config, str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        display = stop_after(patch, 5)
        assert train(config, str(tmp_path / "parts")).step == 5
    assert f" {mixer} model, " in display.lines[0]
    assert train(config, str(tmp_path / "parts")).step == whole.step == 8
    expected = newest_checkpoint(tmp_path / "whole")
    assert newest_checkpoint(tmp_path / "parts") == expected
    assert any(name.startswith(f"carried/0/{carried}") for name in expected)
    model, tokenizer, saved = load_model(str(tmp_path / "parts"), plugin=plugin)
    assert saved.model.mixer == mixer
    assert generate_text(model, tokenizer, ["ab"], max_new_tokens=5)


@functools.cache
def model_of(mixer):
    """Away from its initial values, where convolutions pass the current token alone."""
    model = LanguageModel(config_of(mixer, vocab_size=31).model, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    for _, param in nnx.iter_graph(model):
        if isinstance(param, nnx.Param):
            noise = 0.3 * random.normal(size=param.shape)
            param.set_value(param[...] + noise.astype(np.float32))
    return model


@pytest.mark.oldest_python
@pytest.mark.parametrize("mixer", ["gla", *OTHERS, "decay"])
def test_the_server_generates_the_same_tokens(mixer):
    model = model_of(mixer)
    prompt = np.random.default_rng(5).integers(0, 31, 70, np.int32)
    decoder = Scheduler(model, num_slots=3, cache_bytes=1 << 22)
    expected = generate(model, [prompt], max_new_tokens=17).sequences()[0].tolist()
    for _ in range(2):  # the second time from the prefix cache
        decoder.waiting.append(Job(prompt, Sampling(), max_tokens=17))
        events = []
        while not decoder.is_idle:
            events += [event for _, event in decoder.step() if isinstance(event, NewTokens)]
        assert np.concatenate([event.tokens for event in events]).tolist() == expected


@pytest.mark.oldest_python
@pytest.mark.parametrize("mixer", ["gla", "retnet", "hgrn2"])
def test_the_attention_map_is_exact(mixer):
    model = model_of(mixer)
    tokens = np.random.default_rng(6).integers(0, 31, 27, np.int32)
    _, state = model(jnp.asarray(tokens[None, :9]))
    layers = decompose_layers(model, tokens[9:], state)
    assert len(layers) == 2
    assert all(is_exact(layer, is_float32=True) for layer in layers)
    if mixer != "gla":
        return
    # Without the state of the convolutions, the first tokens have other keys.
    changed = jax.tree.map(np.zeros_like, state)
    without = decompose_layers(model, tokens[9:], changed)
    assert not np.allclose(without[0].weights, layers[0].weights)


def test_only_mixers_of_the_package_are_explained_and_exported_as_programs(tmp_path):
    with pytest.raises(UserError, match="layer 1 has the mixer Decay, which cannot be explained"):
        find_mixers(model_of("decay"))
    with pytest.raises(UserError, match=r"not possible with .* model.mixer='decay'; use safetens"):
        check_architecture("html", model_of("decay"))


def test_a_mixer_is_found_by_its_name():
    with pytest.raises(UserError, match=r"'dekay' is invalid: .* did you mean 'decay'\?.*--plugin"):
        find_mixer("dekay")
    with pytest.raises(ValueError, match="'gla' is already registered"):
        register_mixer("gla")(lambda config, rngs: None)


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ("wrong.py", r"--plugin=.*wrong\.py: line 1: ZeroDivisionError: .*; fix the file"),
        ("exit.py", "line 1: SystemExit: 3"),
        ("/x/y.py", r"--plugin=/x/y\.py: not a Python file"),
        ("no_such", "--plugin=no_such: ModuleNotFoundError: .* that can be imp"),
    ],
)
def test_what_is_wrong_in_a_plugin_is_one_line(tmp_path, monkeypatch, plugin, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.py").write_text("1 / 0\n")
    (tmp_path / "exit.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(UserError, match=message):
        load_plugin(plugin)


def test_the_published_size():
    """Section 5.1 of the paper; the MLP's width is 8/3 of 1,024, to the next multiple of 256."""
    config = gla_340m.get_config()
    validate(config)
    params = abstract_model(config.model)[1]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == 341_707_776
    check_fits(config, mesh_of(fsdp=8))
