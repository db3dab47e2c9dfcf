"""Training steps on meshes of eight devices: those of one device, and what the devices exchange."""

import functools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_collectives import collectives
from meshes import mesh_of
from small_runs import small_config

from simplernn_jax.data.batches import Batch
from simplernn_jax.named_leaves import named_leaves
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.placement import batch_specs, shardings_of
from simplernn_jax.training.train_step import init_train_state, make_train_step, state_specs

MESHES = {
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "tensor 4": {"tensor": 4},
    "sequence 8": {"sequence": 8},
    "data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "data 2, sequence 4": {"data": 2, "sequence": 4},
    "fsdp 2, sequence 2, tensor 2": {"fsdp": 2, "sequence": 2, "tensor": 2},
}
ROWS, LENGTH, VOCAB, STEPS = 8, 40, 12, 5
WIDTHS = {
    "num_layers": 2,
    "hidden_dim": 8,
    "key_dim": 12,
    "value_dim": 20,
    "num_heads": 4,
    "mlp_dim": 28,
}


def config_of(precision="float64", **fields):
    sizes = {"vocab_size": VOCAB, "batch_size": ROWS, "sequence_length": LENGTH}
    config = small_config("residual", **(WIDTHS | {"mode": "stream"} | sizes | fields))
    config.model.precision = precision  # float64 is for tests: `validate` knows nothing of it
    return config


def make_batch(seed):
    """Documents begin and end anywhere; some rows go on with the state of the batch before."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, VOCAB, (ROWS, LENGTH + 1), np.int32)
    begins = random.random((ROWS, LENGTH + 1)) < np.linspace(0, 0.3, ROWS)[:, None]
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=~begins[:, 1:],
        segment_ids=np.cumsum(begins[:, :-1], axis=1, dtype=np.int32),
        reset=begins[:, 0],
    )


@functools.cache
def compiled(mesh_name, precision="float64", **fields):
    """(state, compiled step) on a mesh; None is one device."""
    config = config_of(precision, **fields)
    mesh = None if mesh_name is None else mesh_of(**MESHES[mesh_name])
    optimizer = make_optimizer(config.optimizer, 100, mesh)
    state = jax.jit(lambda: init_train_state(config, optimizer))()
    if precision == "float64":
        wide = {jnp.dtype("float32"): jnp.float64}
        state = jax.tree.map(lambda x: x.astype(wide.get(x.dtype, x.dtype)), state)
    batch = make_batch(0)
    if mesh is not None:
        state = jax.device_put(state, shardings_of(state_specs(config, optimizer, mesh), mesh))
        batch = jax.device_put(batch, shardings_of(batch_specs(mesh), mesh))
    return state, make_train_step(config, optimizer, mesh).lower(state, batch).compile()


def take_steps(mesh_name, *options, **fields):
    """Losses of five steps and the last state."""
    state, step = compiled(mesh_name, *options, **fields)
    state = jax.tree.map(jnp.copy, state)
    losses = []
    for seed in range(STEPS):
        batch = make_batch(seed)
        if mesh_name is not None:
            mesh = mesh_of(**MESHES[mesh_name])
            batch = jax.device_put(batch, shardings_of(batch_specs(mesh), mesh))
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    return losses, state


def assert_near(ours, reference, limit):
    """RMS(difference) at most `limit` RMS(reference)."""
    ours, reference = np.float64(ours), np.float64(reference)
    assert np.isfinite(ours).all()
    assert np.linalg.norm(ours - reference) <= limit * np.linalg.norm(reference)


def assert_each_near(ours, reference, limit):
    """Every array of two states, one by one."""
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        assert one.dtype == other.dtype
        assert_near(one, other, limit)


def joined(params):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])


@pytest.mark.parametrize("mesh_name", MESHES)
def test_five_steps_are_those_of_one_device_in_float64(mesh_name):
    with jax.enable_x64(True):
        losses, state = take_steps(mesh_name)
        expected_losses, expected = take_steps(None)
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-11)
        assert_each_near(state, expected, 1e-11)
        assert int(state.step) == STEPS


@pytest.mark.parametrize("mesh_name", ["data 2, fsdp 2, tensor 2", "data 2, sequence 4"])
def test_five_steps_are_those_of_one_device_in_float32(mesh_name):
    losses, state = take_steps(mesh_name, "float32")
    expected_losses, expected = take_steps(None, "float32")
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    # All parameters together: AdamW divides each gradient by its size, so that a bias that began
    # at zero is as exact as its smallest gradients.
    assert_near(joined(state.params), joined(expected.params), 1e-5)


def test_groups_of_rows_and_muon_are_those_of_one_device():
    options = {"gradient_accumulation": 2, "name": "muon", "tie_embeddings": False}
    with jax.enable_x64(True):
        losses, state = take_steps("fsdp 2, sequence 2, tensor 2", **options)
        expected_losses, expected = take_steps(None, **options)
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-11)
        assert_each_near(state, expected, 1e-11)


def exchanged(sizes, config, itemsize):
    """What the design calls for: ``{(kind, bytes of the result on one device): count}``.

    Without sums of single numbers (loss, count of predictions, norm of the gradient).
    """
    mesh = mesh_of(**sizes)
    copies_of_tokens, fsdp, tensor, sequence = (
        math.prod(mesh.shape[axis] for axis in axes)
        for axes in (("data", "sequence"), ("fsdp",), ("tensor",), ("sequence",))
    )
    model, layers = config.model, config.model.num_layers
    rows = config.data.batch_size // (mesh.shape["data"] * fsdp)
    tokens = rows * config.data.sequence_length // sequence
    heads, key_dim, value_dim = (
        model.num_heads // tensor,
        model.key_dim // model.num_heads,
        model.value_dim // model.num_heads,
    )
    found = Counter()

    def count(kind, elements, times=1):
        found[kind, elements * itemsize] += times

    optimizer = make_optimizer(config.optimizer, 1)
    shapes = jax.eval_shape(lambda: init_train_state(config, optimizer)).params
    specs = jax.tree.leaves(state_specs(config, optimizer, mesh).params)
    for (name, leaf), spec in zip(named_leaves(shapes).items(), specs, strict=True):
        part = leaf.size // math.prod(mesh.shape[axis] for axis in spec if axis)
        if "fsdp" in spec:
            # Gathered in the forward and again in the backward pass; its gradient is summed into
            # parts. The embedding is table (whose gradient needs no copy) and head.
            is_table = name.startswith("embedding")
            count("all-gather", part * fsdp, 3 if is_table else 2)
            count("reduce-scatter", part, 2 if is_table else 1)
            if copies_of_tokens > 1:
                count("all-reduce", part)
        elif copies_of_tokens * fsdp > 1:
            count("all-reduce", part)
    if tensor > 1:
        # Per layer, recurrence and MLP: a sum after the product that ends it, and one of the
        # gradients of its input. And the embedding's rows, and the gradient of the head's input.
        count("all-reduce", tokens * model.hidden_dim, 4 * layers + 2)
        count("all-reduce", tokens, 3)  # the loss: largest logit, sum of exponentials, target's
        count("all-reduce", value_dim, layers)  # the heads' norm, which all devices use
    if sequence > 1:
        state, recent = rows * heads * key_dim * value_dim, rows * 3 * model.hidden_dim
        doublings = math.ceil(math.log2(sequence))
        both_passes = 2 * layers
        # K (V + 1) numbers of each head and row, whatever the length; then the true states.
        message = rows * heads * key_dim * (value_dim + 1)
        count("collective-permute", message, both_passes * doublings)
        count("collective-permute", state, both_passes)
        count("collective-permute", recent, both_passes)  # what the short convolution looks back at
        found["collective-permute", rows * 4] += 1  # the id of the segment before, once
        if config.data.mode == "stream":  # the state after the last stretch, for all
            count("all-reduce", state, layers)
            count("all-reduce", recent, layers)
    return found


def without_scalars(found):
    """All but sums of single numbers, and how many of these there are."""
    scalars = {key for key in found if key[0] == "all-reduce" and key[1] <= 8}
    return {key: n for key, n in found.items() if key not in scalars}, sum(
        found[key] for key in scalars
    )


@pytest.mark.parametrize("mesh_name", MESHES)
def test_devices_exchange_what_the_design_calls_for_and_nothing_else(mesh_name):
    with jax.enable_x64(True):
        state, step = compiled(mesh_name)
    found, scalars = without_scalars(collectives(step))
    assert found == exchanged(MESHES[mesh_name], config_of(), 8)
    # The loss, the count of predictions, and the squares of each array's gradient: for the
    # metrics, and for clipping.
    assert scalars <= 2 + 2 * len(jax.tree.leaves(state.params))


def long_row(length):
    """What is exchanged in a step on one row of so many tokens, over eight stretches."""
    config = config_of("float32", mode="window", batch_size=1, sequence_length=length)
    mesh, optimizer = mesh_of(sequence=8), make_optimizer(config.optimizer, 1)
    state = jax.eval_shape(lambda: init_train_state(config, optimizer))
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, length)[: x.ndim], x.dtype), make_batch(0)
    )
    found = collectives(make_train_step(config, optimizer, mesh).lower(state, batch).compile())
    return without_scalars(found)[0], config


def test_a_row_of_any_length_exchanges_the_same():
    short, config = long_row(1024)
    long, _ = long_row(65_536)
    assert short == long == exchanged({"sequence": 8}, config, 4)


def test_fsdp_holds_a_part_of_the_state_and_one_layer_at_a_time():
    widths = {"hidden_dim": 128, "key_dim": 128, "value_dim": 128, "mlp_dim": 512}
    config = config_of("float32", num_layers=4, mode="window", **widths)
    mesh, optimizer = mesh_of(fsdp=8), make_optimizer(config.optimizer, 1)
    state = jax.eval_shape(lambda: init_train_state(config, optimizer))
    shardings = shardings_of(state_specs(config, optimizer, mesh), mesh)

    def num_bytes(name, parts):
        leaves = jax.tree.leaves((getattr(state, name), getattr(shardings, name)))
        half = len(leaves) // 2
        return sum(
            math.prod(sharding.shard_shape(leaf.shape) if parts else leaf.shape) * 4
            for leaf, sharding in zip(leaves[:half], leaves[half:], strict=True)
        )

    for name in ("params", "opt_state"):
        assert num_bytes(name, True) <= num_bytes(name, False) / 6, name
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_batch(0))
    step = make_train_step(config, optimizer, mesh).lower(state, batch).compile()
    memory = step.memory_analysis()
    assert (
        memory.argument_size_in_bytes
        <= (num_bytes("params", False) + num_bytes("opt_state", False)) / 6
    )
    # Gathered all at once, the parameters alone would take this.
    assert memory.temp_size_in_bytes < num_bytes("params", False) / 2
