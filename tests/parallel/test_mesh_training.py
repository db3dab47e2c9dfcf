"""Training on meshes of eight devices: steps equal one device; their collectives; whole runs."""

import dataclasses
import functools
import math
import shutil
from collections import Counter

import chex
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from small_runs import (
    HYBRID,
    compile_step,
    distance,
    first_state,
    mesh_of,
    newest_checkpoint,
    random_batch,
    run_steps,
    small_config,
    write_corpus,
)

from benchmarks.scaling import text_of_loops
from benchmarks.train_steps import collectives
from simplernn_jax import load_model
from simplernn_jax.errors import UserError
from simplernn_jax.inference import generate_text
from simplernn_jax.parallel.mesh import variable_specs
from simplernn_jax.parallel.named_leaves import named_leaves
from simplernn_jax.training.loop import train
from simplernn_jax.training.metrics import read_metrics
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.train_step import init_train_state, make_train_step

MESHES = {
    "sequence 8": {"sequence": 8},
    "data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "data 2, sequence 4": {"data": 2, "sequence": 4},
    "fsdp 2, sequence 2, tensor 2": {"fsdp": 2, "sequence": 2, "tensor": 2},
}
SIZE, LENGTH, VOCAB, STEPS = 8, 40, 12, 5
WIDTHS = {
    **HYBRID,
    "mixer_options": {
        "context": 8
    },  # of sequence shards of 5 to 20: several of them, or the neighbor's end
    "hidden_dim": 8,
    "key_dim": 24,
    "value_dim": 20,
    "num_heads": 4,
    "mlp_dim": 28,
    # Adam makes steps of one size of gradients of any: of those that rounding left, too, which
    # differ by the order of sums, and the more the longer the steps.
    "learning_rate": 1e-3,
}
RECURRENCE = {"num_layers": 1, "mixer": "simple_rnn"}


def config_of(precision="float64", **fields):
    sizes = {"vocab_size": VOCAB, "batch_size": SIZE, "sequence_length": LENGTH}
    config = small_config(**(WIDTHS | {"mode": "stream"} | sizes | fields))
    config.model.precision = precision  # float64 is for tests: `validate` knows nothing of it
    return config


def make_batch(seed):
    """The first sequence continues from batch to batch; documents begin ever more often below."""
    return random_batch(seed, SIZE, LENGTH, VOCAB, np.linspace(0, 0.3, SIZE)[:, None])


@functools.cache
def start(precision="float64", **fields):
    config = config_of(precision, **fields)
    return first_state(config, make_optimizer(config.optimizer, 100))


@functools.cache
def compiled(mesh_name, *options, **fields):
    """(step on a mesh, state before the first one); None is one device."""
    config = config_of(*options, **fields)
    mesh = None if mesh_name is None else mesh_of(**MESHES[mesh_name])
    optimizer = make_optimizer(config.optimizer, 100, mesh)
    return compile_step(config, optimizer, mesh, start(*options, **fields), make_batch(0))


@functools.cache
def five_steps(mesh_name, **fields):
    return run_steps(*compiled(mesh_name, **fields), map(make_batch, range(STEPS)))


def steps_near_one_device(mesh_name, **fields):
    """Compare the losses and each array of the state; returns the state."""
    losses, state = five_steps(mesh_name, **fields)
    expected_losses, expected = five_steps(None, **fields)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-11)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert distance(one, other) <= 1e-11
    return state


def without_scalars(found):
    """All but sums of single numbers."""
    return {key: n for key, n in found.items() if key[0] != "all-reduce" or key[1] > 8}


@pytest.mark.parametrize("mesh_name", MESHES)
def test_steps_equal_one_device(mesh_name):
    with jax.enable_x64(True):
        state = steps_near_one_device(mesh_name)

        # A value that is not finite on one device skips the update on all.
        carried = jax.tree.map(np.copy, state.carried)
        carried[0].convolution[0] = np.nan
        batch = make_batch(STEPS)._replace(reset=np.zeros(SIZE, bool))
        bad = dataclasses.replace(state, carried=carried)
        losses, after = run_steps(compiled(mesh_name)[0], bad, [batch])
        assert not np.isfinite(losses[0])
        assert after.skipped_updates == 1
        chex.assert_trees_all_equal((after.params, after.opt_state), (bad.params, bad.opt_state))

    # Gathered parameters, keys and values, and the sums of their gradients, along two axes.
    kinds = {kind for kind, _ in collectives(compiled(mesh_name)[0].as_text())}
    gathers = "fsdp" in mesh_name or mesh_name == "sequence 8"
    assert ("reduce-scatter" in kinds) == gathers
    assert ("collective-permute" in kinds) == ("sequence" in mesh_name)
    assert "all-to-all" not in kinds


@pytest.mark.oldest_python
def test_gradient_accumulation_and_muon_equal_one_device():
    options = {"gradient_accumulation": 2, "name": "muon", "tie_embeddings": False}
    with jax.enable_x64(True):
        steps_near_one_device("fsdp 2, sequence 2, tensor 2", **options, **RECURRENCE)


def test_accumulated_gradients_are_reduced_once():
    options = {"gradient_accumulation": 2, "precision": "float32"} | RECURRENCE
    options["mode"] = "window"  # carried states would be reduced in each group
    step, _ = compiled("data 2, sequence 4", **options)
    repeated = without_scalars(collectives(text_of_loops(step.as_text())))
    assert {kind for kind, _ in repeated} == {"collective-permute"}
    assert "all-reduce" in {kind for kind, _ in without_scalars(collectives(step.as_text()))}


def compile_abstractly(config, mesh):
    """The shapes of the state, and the step on batches of the configuration's size."""
    optimizer = make_optimizer(config.optimizer, 1)
    state = jax.eval_shape(lambda: init_train_state(config, optimizer))
    shape = (config.data.batch_size, config.data.sequence_length)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape[: x.ndim], x.dtype), make_batch(0))
    lowered = make_train_step(config, optimizer, mesh).lower(state, batch)
    return state, lowered.compile()


@pytest.mark.oldest_python
def test_collectives_are_independent_of_the_sequence_length():
    found = []
    for length in (1024, 65_536):
        config = config_of(
            "float32", mode="window", batch_size=1, sequence_length=length, **RECURRENCE
        )
        _, step = compile_abstractly(config, mesh_of(sequence=8))
        found.append(without_scalars(collectives(step.as_text())))
    assert found[0] == found[1]


@pytest.mark.oldest_python
def test_collectives_of_data_parallelism_and_of_fsdp():
    widths = {"key_dim": 24, "value_dim": 24, "mlp_dim": 32, "vocab_size": 16} | RECURRENCE
    config = config_of("float32", mode="window", **widths)
    found = []
    for mesh in (mesh_of(data=8), mesh_of(fsdp=8)):
        state, step = compile_abstractly(config, mesh)
        found.append(Counter())
        for (kind, _), number in without_scalars(collectives(step.as_text())).items():
            found[-1][kind] += number
    arrays = named_leaves(state.params)
    kernels = sum("kernel" in name for name in arrays)
    # Every gradient is reduced once.
    assert found[0] == {"all-reduce": len(arrays)}
    # Kernels are gathered forward and backward. The embedding is also the head: it is gathered for
    # the lookup too, and the gradients of both uses are reduced.
    assert found[1] == {
        "all-gather": 2 * kernels + 3,
        "reduce-scatter": kernels + 2,
        "all-reduce": len(arrays) - kernels - 1,
    }


def test_fsdp_shards_the_state_and_gathers_one_layer_at_a_time():
    widths = {"hidden_dim": 256, "key_dim": 256, "value_dim": 256, "mlp_dim": 1024}
    widths |= {"num_layers": 4, "mixer": "simple_rnn"}
    config = config_of("float32", mode="window", sequence_length=8, **widths)
    mesh = mesh_of(fsdp=8)
    state, step = compile_abstractly(config, mesh)
    specs = variable_specs(state, mesh)
    for name in ("params", "opt_state"):
        leaves, parts = jax.tree.leaves(getattr(state, name)), getattr(specs, name)
        whole = sum(leaf.size for leaf in leaves)
        part = sum(
            math.prod(NamedSharding(mesh, spec).shard_shape(leaf.shape))
            for leaf, spec in zip(leaves, jax.tree.leaves(parts), strict=True)
        )
        assert part <= whole / 6, name
    memory, num_bytes = step.memory_analysis(), 4 * sum(x.size for x in jax.tree.leaves(state))
    assert memory.argument_size_in_bytes <= num_bytes / 6
    # The state is parameters and two means; the parameters gathered all at once are a third.
    assert memory.temp_size_in_bytes < num_bytes / 3 / 2


RUN = HYBRID | {
    "mixer_options": {"context": 10},  # into another sequence shard of 6, and another batch
    "vocab_size": 260,
    "num_heads": 2,
    "mlp_dim": 12,
    "validation_fraction": 0.3,
    "mode": "stream",
    "batch_size": 4,
    "sequence_length": 12,
    "steps": 6,
    "log_every": 1,
}


def test_a_run_on_a_mesh_resumes_bit_exactly_and_is_used_on_one_device(tmp_path):
    steps, half = RUN["steps"], RUN["steps"] // 2
    halfway = {"eval_every": half, "sample_every": half, "save_every": half}
    fields = RUN | {"fsdp": 2, "tensor": 2, "sequence": 2}
    fields["source"] = write_corpus(tmp_path / "text", documents=9)
    whole = train(small_config(**fields, **halfway), str(tmp_path / "whole"))
    assert (whole.step, whole.interrupted_by) == (steps, None)
    assert np.isfinite(whole.evaluation.nats_per_token)
    rows = read_metrics(str(tmp_path / "whole"))
    kinds = [(row["step"], row["kind"]) for row in rows]
    assert kinds[half : half + 2] == [(half, "validation"), (half, "sample")]

    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / str(steps))
    assert train(small_config(**fields), str(tmp_path / "half")).step == steps
    found, expected = newest_checkpoint(tmp_path / "half"), newest_checkpoint(tmp_path / "whole")
    for saved in (found, expected):
        del saved["position in the data"]["evaluations"]  # one evaluates at its end only
    assert found == expected

    model, tokenizer, config = load_model(str(tmp_path / "whole"))
    assert config.mesh.tensor == 2
    (text,) = generate_text(model, tokenizer, "ab", max_new_tokens=3)
    assert isinstance(text, str)


def test_a_run_that_does_not_fit_its_mesh_is_rejected_before_it_trains(tmp_path):
    config = small_config(**RUN, source=write_corpus(tmp_path / "text"), data=8)
    with pytest.raises(UserError, match=r"batch_size=4 is not divisible by data 8 \* fsdp 1"):
        train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()
