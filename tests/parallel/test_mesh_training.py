"""Training steps on meshes of eight devices: equal to one device, and their collectives."""

import dataclasses
import functools
import math
from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from meshes import compile_step, distance, first_state, mesh_of, run_steps
from small_runs import HYBRID, random_batch, small_config

from benchmarks.sizes import bytes_by_kind, text_of_loops
from benchmarks.train_steps import collectives
from simplernn_jax.parallel.named_leaves import named_leaves
from simplernn_jax.parallel.shardings import variable_specs
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.train_step import init_train_state, make_train_step, state_specs

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


def five_steps(mesh_name, *options, **fields):
    return run_steps(*compiled(mesh_name, *options, **fields), map(make_batch, range(STEPS)))


expected_steps = functools.cache(functools.partial(five_steps, None))


def assert_each_near(ours, reference, limit):
    """Compare the arrays of two states one by one."""
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        assert distance(one, other) <= limit


def exchanged(sizes, config, itemsize):
    """Collectives of the design: ``{(kind, bytes of the result on one device): count}``.

    Without sums of single numbers (loss, count of predictions, norm of the gradient).
    """
    mesh = mesh_of(**sizes)
    copies_of_tokens, fsdp, tensor, sequence = (
        math.prod(mesh.shape[axis] for axis in axes)
        for axes in (("data", "sequence"), ("fsdp",), ("tensor",), ("sequence",))
    )
    model, layers = config.model, config.model.num_layers
    rows = config.data.batch_size // (mesh.shape["data"] * fsdp)
    # Of each iteration of the loop over microbatches.
    rows //= config.train.gradient_accumulation or 1
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
            is_head = is_table and model.tie_embeddings
            count("all-gather", part * fsdp, is_table + 2 * (is_head or not is_table))
            count("reduce-scatter", part, is_table + (is_head or not is_table))
            if copies_of_tokens > 1:
                count("all-reduce", part)
        elif copies_of_tokens * fsdp > 1:
            count("all-reduce", part)
        if config.optimizer.name == "muon" and "kernel" in name:
            for axis in filter(None, spec):  # put together along one axis, then the other
                part *= mesh.shape[axis]
                count("all-gather", part)
    if tensor > 1:
        # Per layer, recurrence and MLP: a sum after the product that ends it, and one of the
        # gradients of its input. And the embedding's rows, and the gradient of the head's input.
        count("all-reduce", tokens * model.hidden_dim, 4 * layers + 2)
        count("all-reduce", tokens, 3)  # the loss: largest logit, sum of exponentials, target's
    if sequence > 1:
        recurrences, attentions = map(model.mixers.count, ("simple_rnn", "attention"))
        state, recent = rows * heads * key_dim * value_dim, rows * 3 * model.hidden_dim
        doublings = math.ceil(math.log2(sequence))
        # K (V + 1) numbers per head and sequence at any length; then the exact states.
        message = rows * heads * key_dim * (value_dim + 1)
        count("collective-permute", message, 2 * recurrences * doublings)
        count("collective-permute", state, 2 * recurrences)
        count("collective-permute", recent, 2 * layers)  # inputs of the short convolution
        found["collective-permute", rows * 4] += 1  # the id of the segment before, once
        if config.data.mode == "stream":  # broadcast of the state after the last shard
            count("all-reduce", state, recurrences)
            count("all-reduce", recent, layers)
        found += _exchanged_by_attention(config, rows, heads, sequence, attentions, itemsize)
    return +found


def _exchanged_by_attention(config, rows, heads, sequence, layers, itemsize):
    """Collectives between sequence shards: K + V numbers per head and visible token."""
    model, found = config.model, Counter()
    shard, past = config.data.sequence_length // sequence, model.mixer_options["context"] - 1
    found["all-gather", rows * sequence * 4] += layers  # the first segment boundary of each shard
    for width in (model.key_dim // model.num_heads, model.value_dim // model.num_heads):
        channels = rows * heads * width * itemsize
        if past <= shard:
            found["collective-permute", past * channels] += 2 * layers
        else:
            found["all-gather", sequence * shard * channels] += layers
            found["reduce-scatter", shard * channels] += layers
        if config.data.mode == "stream":
            found["all-reduce", model.mixer_options["context"] * channels] += layers
    if config.data.mode == "stream":
        found["all-reduce", rows * 4] += layers
    return found


def without_scalars(found):
    """All but sums of single numbers, and how many of these there are."""
    scalars = {key for key in found if key[0] == "all-reduce" and key[1] <= 8}
    return {key: n for key, n in found.items() if key not in scalars}, sum(
        found[key] for key in scalars
    )


@pytest.mark.fewer_cases
@pytest.mark.parametrize("mesh_name", MESHES)
def test_steps_equal_one_device_and_collectives_are_those_of_the_design(mesh_name):
    with jax.enable_x64(True):
        losses, state = five_steps(mesh_name)
        expected_losses, expected = expected_steps()
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-11)
        assert_each_near(state, expected, 1e-11)

        # A value that is not finite on one device skips the update on all.
        carried = jax.tree.map(np.copy, state.carried)
        carried[0].convolution[0] = np.nan
        batch = make_batch(STEPS)._replace(reset=np.zeros(SIZE, bool))
        bad = dataclasses.replace(state, carried=carried)
        losses, after = run_steps(compiled(mesh_name)[0], bad, [batch])
        assert not np.isfinite(losses[0])
        assert after.skipped_updates == 1
        chex.assert_trees_all_equal((after.params, after.opt_state), (bad.params, bad.opt_state))

        found, scalars = without_scalars(collectives(compiled(mesh_name)[0].as_text()))
        assert found == exchanged(MESHES[mesh_name], config_of(), 8)
    # The loss, the count of predictions, and the squares of each array's gradient along each of
    # two axes at most.
    assert scalars <= 2 + 2 * len(jax.tree.leaves(state.params))


@pytest.mark.oldest_python
def test_gradient_accumulation_and_muon_equal_one_device():
    options = {"gradient_accumulation": 2, "name": "muon", "tie_embeddings": False}
    options |= RECURRENCE
    mesh_name = "fsdp 2, sequence 2, tensor 2"
    with jax.enable_x64(True):
        losses, state = five_steps(mesh_name, **options)
        expected_losses, expected = expected_steps(**options)
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-11)
        assert_each_near(state, expected, 1e-11)
    found, _ = without_scalars(collectives(compiled(mesh_name, **options)[0].as_text()))
    assert found == exchanged(MESHES[mesh_name], config_of(**options), 8)


def test_accumulated_gradients_are_reduced_once():
    options = {"gradient_accumulation": 2, "precision": "float32"} | RECURRENCE
    options["mode"] = "window"  # carried states would be reduced in each group
    step, _ = compiled("data 2, sequence 4", **options)
    repeated, _ = without_scalars(collectives(text_of_loops(step.as_text())))
    assert {kind for kind, _ in repeated} == {"collective-permute"}
    assert "all-reduce" in {kind for kind, _ in without_scalars(collectives(step.as_text()))[0]}


def test_collectives_in_loops_and_of_booleans_are_counted():
    mesh = mesh_of(data=2)

    def exchange(x):
        gathered = jax.lax.all_gather(x > 0, "data", tiled=True)
        return gathered, jax.lax.fori_loop(0, 5, lambda _, y: jax.lax.psum(jnp.sin(y), "data"), x)

    spec = jax.sharding.PartitionSpec("data")
    spread = jax.shard_map(
        exchange, mesh=mesh, in_specs=spec, out_specs=(spec, spec), check_vma=False
    )
    text = jax.jit(spread).lower(jnp.ones(14)).compile().as_text()
    assert collectives(text) == {("all-gather", 14): 1, ("all-reduce", 28): 1}
    assert collectives(text_of_loops(text)) == {("all-reduce", 28): 1}
    config = small_config(gradient_accumulation=5)
    assert bytes_by_kind(text, config) == {"all-gather": 14, "all-reduce": 5 * 28}


@pytest.mark.oldest_python
def test_dropout_differs_between_devices_and_is_reproducible():
    name, options = "data 2, fsdp 2, tensor 2", {"precision": "float32", "dropout": 0.5}
    options["mixer"] = "simple_rnn"
    batch = jax.tree.map(lambda x: np.repeat(x[:1], SIZE, axis=0), make_batch(1))
    once, again = (run_steps(*compiled(name, **options), [batch]) for _ in range(2))
    chex.assert_trees_all_equal(once, again)
    last_layer = once[1].carried[-1].mixer
    assert len(np.unique(last_layer.reshape(SIZE, -1), axis=0)) == SIZE


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
        found.append(without_scalars(collectives(step.as_text()))[0])
    assert found[0] == found[1] == exchanged({"sequence": 8}, config, 4)


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
