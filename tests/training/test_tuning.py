"""Fine-tuning of an initial state or of low-rank updates: gradients, files, resumption, errors."""

import dataclasses
import math
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from processes import ROOT, run_scripts
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
    untrained_run,
    write_corpus,
)

from simplernn_jax import load_model
from simplernn_jax.errors import UserError
from simplernn_jax.inference import generate_text, load_state
from simplernn_jax.inference.adapter import save_adapter
from simplernn_jax.models.language_model import abstract_model
from simplernn_jax.models.pytorch_weights import decode_safetensors
from simplernn_jax.parallel.named_leaves import in_layout_of, named_leaves
from simplernn_jax.training.evaluate import Evaluator
from simplernn_jax.training.loop import train
from simplernn_jax.training.losses import cross_entropy
from simplernn_jax.training.preparation import prepare
from simplernn_jax.training.tuning import trained_part, with_trained

RANK = 3
BATCH = random_batch(0, 4, 24, 12, 0.05)._replace(reset=np.ones(4, bool))
"""Documents begin within the sequences."""
SIZES = {"hidden_dim": 8, "key_dim": 8, "value_dim": 12, "mlp_dim": 12, "num_heads": 2}
SGD = optax.sgd(1.0)
"""Under it the change of what is trained is the gradient."""
KINDS = ("state", f"lora:{RANK}")
FILES = dict(zip(KINDS, ("state.safetensors", "adapter.safetensors"), strict=True))


def config_of(tune, precision="float64", **fields):
    rows = {"vocab_size": 12, "batch_size": 4, "sequence_length": 24, "init_from": "x"}
    return small_config("parallel", **SIZES, **rows, precision=precision, tune=tune, **fields)


def start(config):
    """The state before the first step, in which nothing that is trained is zero."""
    state = first_state(config, SGD)
    draw = np.random.default_rng(0)
    trained = trained_part(state.params, state.tuned)
    trained = jax.tree.map(lambda x: draw.normal(0, 0.3, x.shape).astype(x.dtype), trained)
    params, tuned = jax.device_get(jax.jit(with_trained)(state.params, state.tuned, trained))
    return dataclasses.replace(state, params=params, tuned=tuned)


def gradient(tune, mesh, **fields):
    """Loss and gradient of one step, with the layers one by one."""
    config, before = config_of(tune, **mesh, **fields), start(config_of(tune, **fields))
    step = compile_step(config, SGD, mesh_of(**mesh) if mesh else None, before, BATCH)
    (loss,), after = run_steps(*step, [BATCH])
    after = in_layout_of(before, after)
    parts = [trained_part(each.params, each.tuned) for each in (before, after)]
    return loss, jax.tree.map(np.subtract, *parts)


def defined_gradient(tune, **fields):
    """The same by the definition: scan, explicit products, and the mask of first documents."""
    config = config_of(tune, mixer_options={"method": "scan"}, **fields)
    state = jax.tree.map(jnp.asarray, start(config))
    graph, _ = abstract_model(config.model)
    tokens, targets, mask, segment_ids, _ = BATCH
    if tune == "state":
        mask = mask & (segment_ids == segment_ids[:, :1])

    def loss_fn(trained):
        params, initial = state.params, None
        if tune == "state":
            initial = jax.tree.map(lambda x: jnp.repeat(x, 4, 0), trained["initial"])
        else:
            flat = named_leaves(params)
            for name, a in named_leaves(trained["a"]).items():
                update = jnp.einsum("ir,ro->io", a, named_leaves(trained["b"])[name])
                flat[name] = named_leaves(state.tuned["base"])[name] + 4 / math.sqrt(RANK) * update
            params = jax.tree.unflatten(jax.tree.structure(params), list(flat.values()))
        model = nnx.merge(graph, params)
        logits, _ = model(jnp.asarray(tokens), initial, jnp.asarray(segment_ids))
        return jnp.sum(cross_entropy(logits, targets, mask)) / float(mask.sum())

    return jax.jit(jax.value_and_grad(loss_fn))(trained_part(state.params, state.tuned))


@pytest.mark.oldest_python
@pytest.mark.parametrize(
    ("tune", "mesh", "layers"),
    [
        *((tune, {}, 1) for tune in KINDS),
        ("state", {"data": 2, "fsdp": 2}, 1),
        (KINDS[1], {"fsdp": 2, "tensor": 2}, 1),
        pytest.param(KINDS[1], {"pipeline": 2, "data": 2}, 2, marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_the_definition(tune, mesh, layers):
    options = {} if mesh else {"gradient_accumulation": 2, "bptt_window": 8, "bptt": "full"}
    with jax.enable_x64(True):
        loss, expected = jax.device_get(defined_gradient(tune, num_layers=layers))
        found_loss, found = gradient(tune, mesh, num_layers=layers, **options)
    assert found_loss == pytest.approx(loss, rel=1e-11)
    assert distance(found, expected) <= 1e-11
    if not mesh:
        _, found = gradient(tune, mesh, precision="float32")  # by the fused kernels
        assert distance(jax.tree.map(np.float64, found), expected) <= 2e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return untrained_run(tmp_path_factory.mktemp("base"), block="parallel", dropout=0.1, **SIZES)


def tuning(base, tmp_path, tune, **fields):
    fields = {"steps": 4, "name": "muon", "init_from": str(base), "tune": tune} | fields
    source = write_corpus(tmp_path / "texts", seed=1)
    return small_config("parallel", source=source, **SIZES | {"dropout": 0.1} | fields)


@pytest.mark.parametrize("tune", KINDS)
def test_a_run_resumes_bit_exactly_and_its_file_fits_the_base(base, tmp_path, monkeypatch, tune):
    config = tuning(base, tmp_path, tune, validation_fraction=0.3, eval_every=2, save_every=2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config, whole)
    stop_after(monkeypatch, 2)
    assert train(config, parts).interrupted_by
    monkeypatch.undo()
    train(config, parts)
    assert newest_checkpoint(whole) == newest_checkpoint(parts)
    contents = [decode_safetensors((run / FILES[tune]).read_bytes()) for run in (whole, parts)]
    chex.assert_trees_all_equal(*(arrays for arrays, _ in contents))
    assert contents[0][1] == contents[1][1]

    original, tokenizer, _ = load_model(base)
    tuned, _, _ = load_model(whole)
    pairs = zip(*(jax.tree.leaves(nnx.state(m)) for m in (original, tuned)), strict=True)
    same = {np.array_equal(*pair) for pair in pairs}
    assert same == ({True} if tune == "state" else {False, True})  # the rest stays
    if tune == "state":
        state = load_state(whole / FILES[tune], original, tokenizer)
        untuned = generate_text(original, tokenizer, "", max_new_tokens=0).state
        assert distance(state.layers, untuned.layers) > 0.01
        assert (state.recent == untuned.recent).all()
        generate_text(original, tokenizer, "a", state=state, max_new_tokens=3)
        (scored,) = run_scripts((ROOT / "scripts" / "evaluate.py", f"--workdir={whole}"))
        assert "carried within each document, from the learned one" in scored.output
    else:
        merged, _, _ = load_model(base, adapter=whole / FILES[tune])
        chex.assert_trees_all_close(nnx.state(merged), nnx.state(tuned), rtol=1e-6, atol=1e-7)


def test_documents_are_evaluated_from_the_learned_state(base, tmp_path):
    config, corpus, _ = prepare(tuning(base, tmp_path, "state"), str(tmp_path / "run"))
    model, tokenizer, _ = load_model(base)
    params = nnx.state(model, nnx.Param)
    draw = np.random.default_rng(0)
    initial = jax.tree.map(
        lambda x: jnp.asarray(draw.normal(size=x.shape), x.dtype), model.initial_state(1)
    )
    nats = []
    for text in Path(config.data.source).iterdir():
        ids = np.array([[tokenizer.bos_id, *tokenizer.encode(text.read_text()), tokenizer.eos_id]])
        logits, _ = model(jnp.asarray(ids[:, :-1]), initial)
        nats.append(
            float(np.sum(cross_entropy(logits, ids[:, 1:], np.ones_like(ids[:, 1:], bool))))
        )
    found = Evaluator(config, tokenizer.pad_id)(params, corpus.train, initial=initial)
    assert found.nats_per_token * found.predictions == pytest.approx(sum(nats), rel=1e-5)


def test_what_does_not_fit_the_model_is_rejected(base, tmp_path):
    for fields, problem in (
        ({"tune": "lora:9"}, r"gate_proj.kernel is \[8, 8\]; use a rank of at most 8"),
        ({"tune": "state", "dropout": 0.2}, "dropout is 0.2, checkpoint has 0.1; omit these"),
    ):
        with pytest.raises(UserError, match=problem):
            train(tuning(base, tmp_path, **fields), tmp_path / "rejected")
    attention = untrained_run(tmp_path, block="parallel", mixer="attention", dropout=0.1, **SIZES)
    with pytest.raises(UserError, match="no recurrent state, but a cache; use lora:8"):
        train(tuning(attention, tmp_path, "state", mixer="attention"), tmp_path / "rejected")

    train(tuning(base, tmp_path, "lora:2", steps=1), tmp_path / "run")
    with pytest.raises(UserError, match=r"config.train.tune is 'state', checkpoint has 'lora:2'"):
        train(tuning(base, tmp_path, "state", steps=1), tmp_path / "run")
    path = tmp_path / "run" / "adapter.safetensors"
    for model, problem in ((tmp_path / "run", "of another model; use"), (base, "corrupted; use")):
        with pytest.raises(UserError, match=problem):
            load_model(model, adapter=path)
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    save_adapter(str(path), load_model(base)[0], {"a": nnx.State({"x": np.ones(3)})})
    with pytest.raises(UserError, match=r"its arrays do not fit this model .*; make the low-rank"):
        load_model(base, adapter=path)
