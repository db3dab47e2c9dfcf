"""The gla block everywhere else: training, meshes, serving, explaining, its published size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from meshes import compile_step, distance, first_state, mesh_of, run_steps
from processes import run_scripts
from small_runs import (
    newest_checkpoint,
    random_batch,
    save_untrained,
    small_config,
    stop_after,
    write_corpus,
)

from configs import gla_340m
from simplernn_jax import load_model
from simplernn_jax.analysis.decomposition import decompose_layers, is_exact
from simplernn_jax.config import validate
from simplernn_jax.errors import UserError
from simplernn_jax.inference import generate, generate_text
from simplernn_jax.inference.sampling import Sampling
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.language_model import abstract_model
from simplernn_jax.parallel.layer_layout import in_layout_of
from simplernn_jax.parallel.mesh import check_fits
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
    "short_convolution": 4,
    "min_log_gate": -0.06,
    "norm_epsilon": 1e-5,
}
MESHES = {
    "data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp 2, sequence 2, tensor 2": {"fsdp": 2, "sequence": 2, "tensor": 2},
    "sequence 4": {"sequence": 4},
    "stage 2, tensor 2": {"stage": 2, "tensor": 2},
}
BATCH, LENGTH, VOCAB = 4, 24, 12


def gla_config(**fields):
    return small_config("gla", **SIZES | fields)


def make_batch(seed):
    """The first sequence continues from batch to batch; documents begin ever more often below."""
    return random_batch(seed, BATCH, LENGTH, VOCAB, np.linspace(0, 0.3, BATCH)[:, None])


@functools.cache
def three_steps(mesh_name=None, **fields):
    """Losses and last state of three steps in float64 with a carried state."""
    sizes = {"vocab_size": VOCAB, "batch_size": BATCH, "sequence_length": LENGTH}
    stages = MESHES[mesh_name].get("stage", 1) if mesh_name else 1
    config = gla_config(**sizes | {"learning_rate": 1e-3, "stage": stages} | fields)
    config.model.precision = "float64"  # for tests: `validate` knows nothing of it
    mesh = None if mesh_name is None else mesh_of(**MESHES[mesh_name])
    optimizer = make_optimizer(config.optimizer, 100, mesh)
    config.mesh.stage = 1
    state = first_state(config, optimizer)
    config.mesh.stage = stages
    compiled = compile_step(config, optimizer, mesh, state, make_batch(0))
    return run_steps(*compiled, map(make_batch, range(3)))


@pytest.mark.fewer_cases
@pytest.mark.parametrize(
    ("mesh_name", "mode"),
    [(name, "window" if name == "sequence 4" else "stream") for name in MESHES],
)
def test_steps_on_a_mesh_equal_one_device(mesh_name, mode):
    with jax.enable_x64(True):
        losses, state = three_steps(mesh_name, mode=mode)
        expected_losses, expected = three_steps(mode=mode)
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-11)
        assert len(set(losses)) == 3
        state = in_layout_of(expected, state)
        for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
            assert distance(one, np.asarray(other)) <= 1e-10


def test_a_convolution_wider_than_a_sequence_shard_is_refused():
    config = gla_config(short_convolution=9, sequence_length=24)
    check_fits(config, mesh_of(sequence=3))
    message = r"leaves each device of sequence 4 a shard of 6, .* needs 8 tokens"
    with pytest.raises(UserError, match=message):
        check_fits(config, mesh_of(sequence=4))


def test_the_rank_of_the_gates_is_sharded_over_fsdp():
    config = gla_config(hidden_dim=9, batch_size=3)
    with pytest.raises(UserError, match=r"mesh\.fsdp=3 does not divide 16, the rank of the forget"):
        check_fits(config, mesh_of(fsdp=3))


@pytest.mark.oldest_python
def test_a_run_resumes_bit_exactly_and_generates(tmp_path, monkeypatch):
    source = write_corpus(tmp_path / "text")
    config = gla_config(source=source, mode="stream", save_every=5, steps=12, log_every=1)
    config.model.num_layers = 1
    whole = train(config, str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        display = stop_after(patch, 7)
        assert train(config, str(tmp_path / "parts")).step == 7
    assert display.lines[0].startswith("gla model, ")
    assert train(config, str(tmp_path / "parts")).step == whole.step == 12
    expected = newest_checkpoint(tmp_path / "whole")
    assert newest_checkpoint(tmp_path / "parts") == expected
    assert any(name.startswith("carried/0/recent/key") for name in expected)
    model, tokenizer, saved = load_model(str(tmp_path / "parts"))
    assert saved.model.block == "gla"
    assert generate_text(model, tokenizer, ["ab"], max_new_tokens=5)


@pytest.fixture(scope="module")
def model():
    """Away from its initial values, where convolutions pass the current token alone."""
    model = LanguageModel(gla_config(vocab_size=31).model, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    for _, param in nnx.iter_graph(model):
        if isinstance(param, nnx.Param):
            noise = 0.3 * random.normal(size=param.shape)
            param.set_value(param[...] + noise.astype(np.float32))
    return model


@pytest.mark.oldest_python
def test_the_server_generates_the_same_tokens(model):
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
def test_the_attention_map_is_exact(model):
    tokens = np.random.default_rng(6).integers(0, 31, 27, np.int32)
    _, state = model(jnp.asarray(tokens[None, :9]))
    layers = decompose_layers(model, tokens[9:], state)
    assert len(layers) == 2
    assert all(is_exact(layer, is_float32=True) for layer in layers)
    # Without the state of the convolutions, the first tokens have other keys.
    changed = jax.tree.map(np.zeros_like, state)
    without = decompose_layers(model, tokens[9:], changed)
    assert not np.allclose(without[0].weights, layers[0].weights)


@pytest.mark.oldest_python
def test_explain(tmp_path):
    source = write_corpus(tmp_path / "text")
    save_untrained(gla_config(source=source, validation_fraction=0.3), tmp_path / "run")
    out = tmp_path / "out"
    (result,) = run_scripts(
        ("scripts/explain.py", "--workdir", tmp_path / "run", "--text", "größer als", "--out", out)
    )
    assert result.code == 0, result.errors
    lines = result.output.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["layer 1", "layer 2"]
    assert {"explain.html", "half_lives.png", "state_rank.png"} <= {p.name for p in out.iterdir()}


def test_the_published_size():
    """Section 5.1 of the paper; the MLP's width is 8/3 of 1,024, to the next multiple of 256."""
    config = gla_340m.get_config()
    validate(config)
    params = abstract_model(config.model)[1]
    shapes = dict.fromkeys(((1024, 512), (1024, 1024), (1024, 2816), (2816, 1024)), 0)
    for leaf in jax.tree.leaves(params):
        shapes[leaf.shape] = shapes.get(leaf.shape, 0) + 1
    expected = {(1024, 512): 48, (1024, 1024): 72, (1024, 2816): 48, (2816, 1024): 24}
    expected |= {(32000, 1024): 1, (1024, 16): 24, (16, 512): 24, (512,): 24, (256,): 24}
    expected[1024,] = 49
    assert shapes == expected
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == 341_707_776
    check_fits(config, mesh_of(fsdp=8))
