"""Operands that are sharded under plain `jit`: results stay sharded, and few bytes move."""

import functools
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.compiled_collectives import collectives
from simplernn_jax.config import ModelConfig
from simplernn_jax.models import LanguageModel
from simplernn_jax.ops import gated_linear_recurrence
from simplernn_jax.ops.rms_norm_convolution import rms_norm_convolution

B, T, H, K, V = 4, 24, 4, 3, 5
STATE_BYTES = B * H * K * V * 4
METHODS = [
    pytest.param(
        "fused",
        marks=pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
    ),
    "chunkwise",
]


def mesh():
    return jax.make_mesh((2, 2, 2), ("x", "y", "z"), axis_types=(AxisType.Auto,) * 3)


def draw():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(B, T, H, K)), jnp.float32) for _ in range(2))
    v = jnp.asarray(rng.normal(size=(B, T, H, V)), jnp.float32)
    log_gate = jnp.asarray(-0.1 * rng.exponential(size=q.shape), jnp.float32)
    state = jnp.asarray(rng.normal(size=(B, H, K, V)), jnp.float32)
    ids = jnp.asarray(np.cumsum(rng.random((B, T)) < 0.1, axis=1), jnp.int32)
    return q, k, v, log_gate, state, ids


def value_and_gradients(method, segments):
    def total(q, k, v, log_gate, state, ids):
        output, state = gated_linear_recurrence(
            q,
            k,
            v,
            log_gate,
            initial_state=state,
            segment_ids=ids if segments else None,
            method=method,
        )
        return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.cos(state)), (output, state)

    return jax.jit(jax.grad(total, (0, 1, 2, 3, 4), has_aux=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("batch", "time", "heads", "segments"),
    [
        ("x", None, None, False),
        (("x", "y"), None, "z", True),
        ("x", "y", "z", True),
        (None, ("x", "z"), None, False),
    ],
    ids=str,
)
def test_the_recurrence_stays_sharded(batch, time, heads, method, segments):
    inputs = draw()
    specs = [P(batch, time, heads)] * 4 + [P(batch, heads), P(batch, time)]
    sharded = [
        jax.device_put(x, NamedSharding(mesh(), spec))
        for x, spec in zip(inputs, specs, strict=True)
    ]
    program = value_and_gradients(method, segments).lower(*sharded).compile()
    gradients, (output, state) = program(*sharded)
    chex.assert_trees_all_close(
        (gradients, (output, state)),
        value_and_gradients("scan", segments)(*inputs),
        rtol=2e-4,
        atol=2e-4,
    )
    for result, spec in zip(
        (*gradients, output, state), [*specs[:5], specs[0], specs[4]], strict=True
    ):
        assert result.sharding.is_equivalent_to(NamedSharding(mesh(), spec), result.ndim)
    moved = collectives(program)
    if time is None:
        assert not moved
    else:  # states and decays between sequence shards, and where segments start; never tokens
        assert moved
        shards = 4 if isinstance(time, tuple) else 2
        assert max(size for _, size in moved) <= shards * STATE_BYTES
        assert not any(kind == "all-gather" and size >= output.nbytes for kind, size in moved)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize(
    ("batch", "time", "moves"),
    [("x", None, False), (None, "z", True), ("x", ("y", "z"), True), (None, ("x", "y", "z"), True)],
    ids=str,
)
def test_the_convolution_stays_sharded(batch, time, moves, segments):
    rng = np.random.default_rng(0)
    width, dim = 4, 5
    x = jnp.asarray(rng.normal(size=(B, T, dim)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(width, dim)), jnp.float32)
    recent = jnp.asarray(rng.normal(size=(B, width - 1, dim)), jnp.float32)
    starts = jnp.asarray(rng.random((B, T)) < 0.3)

    def gradients(native):
        def total(x, weights, recent, starts):
            starts = starts if segments else None
            y, final = rms_norm_convolution(x, weights, recent, starts, native=native)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(final)), (y, final)

        return jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))

    inputs = x, weights, recent, starts
    specs = P(batch, time), P(), P(batch), P(batch, time)
    sharded = [
        jax.device_put(a, NamedSharding(mesh(), spec))
        for a, spec in zip(inputs, specs, strict=True)
    ]
    program = gradients(True).lower(*sharded).compile()
    ours = program(*sharded)
    chex.assert_trees_all_close(ours, gradients(False)(*inputs), rtol=2e-4, atol=2e-5)
    assert ours[1][0].sharding.is_equivalent_to(sharded[0].sharding, 3)
    # Sums of gradients, and, between sequence shards of at least three tokens, inputs.
    largest = max((size for _, size in collectives(program)), default=0)
    assert largest <= max(recent.nbytes, weights.nbytes)
    assert ("collective-permute" in {kind for kind, _ in collectives(program)}) == moves


@pytest.mark.parametrize("method", METHODS)
def test_operands_sharded_in_different_ways(method):
    inputs = draw()
    # "x" shards the batch of q and the time of k: one of them is resharded.
    specs = [P("x"), P(None, "x"), P(None, "y"), P("y"), P(None, "x"), P("z", "y")]
    sharded = [
        jax.device_put(x, NamedSharding(mesh(), spec))
        for x, spec in zip(inputs, specs, strict=True)
    ]
    chex.assert_trees_all_close(
        value_and_gradients(method, True)(*sharded),
        value_and_gradients("scan", True)(*inputs),
        rtol=2e-4,
        atol=2e-5,
    )


@pytest.mark.parametrize("method", METHODS)
def test_shards_of_unequal_length(method):
    """XLA pads the last shard, with what the operations before have made of zeros."""
    sharding = NamedSharding(mesh(), P(None, ("x", "y")))

    def total(constrain, method, *inputs):
        q, k, v, log_gate = (constrain(x[:, :22]) for x in inputs)
        results = gated_linear_recurrence(
            q + 1, jnp.exp(k), jnp.cos(v), log_gate - 0.5, method=method
        )
        return sum(jnp.sum(jnp.sin(x)) for x in results), results

    def value_and_gradients(constrain, method):
        function = functools.partial(total, constrain, method)
        return jax.jit(jax.value_and_grad(function, (0, 1, 2, 3), has_aux=True))

    inputs = draw()[:4]
    chex.assert_trees_all_close(
        value_and_gradients(lambda x: jax.lax.with_sharding_constraint(x, sharding), method)(
            *inputs
        ),
        value_and_gradients(lambda x: x, "scan")(*inputs),
        rtol=2e-4,
        atol=2e-4,
    )


@pytest.mark.parametrize(
    ("precision", "spec", "kinds"),
    [
        # The sums of the gradients, and nothing else.
        ("float32", P(("x", "y", "z")), {"all-reduce"}),
        ("bfloat16", P(("x", "y", "z")), {"all-reduce"}),
        ("float32", P("x", ("y", "z")), {"all-reduce", "all-gather", "collective-permute"}),
    ],
    ids=["batch", "batch-bfloat16", "time"],
)
def test_the_model_stays_sharded(precision, spec, kinds):
    config = ModelConfig(
        vocab_size=13,
        hidden_dim=32,
        key_dim=32,
        value_dim=32,
        num_layers=2,
        precision=precision,
    )
    graph, params = nnx.split(LanguageModel(config, rngs=nnx.Rngs(0)), nnx.Param)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 13, (8, 128)), jnp.int32)

    @jax.jit
    def gradient(params, tokens):
        def total(params):
            logits, state = nnx.merge(graph, params)(tokens)
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0]), state

        return jax.grad(total, has_aux=True)(params)

    everywhere, sharded = NamedSharding(mesh(), P()), NamedSharding(mesh(), spec)
    inputs = jax.device_put(params, everywhere), jax.device_put(tokens, sharded)
    program = gradient.lower(*inputs).compile()
    found = collectives(program)
    assert {kind for kind, _ in found} == kinds
    # Less than the activations of a layer, of the sequences that a device has.
    assert all(kind == "all-reduce" or size < 4 * 128 * 32 * 4 for kind, size in found)
    # Partitioned sums are rounded in another order, and where they end in bfloat16 by its last bit.
    tolerance = (
        {"rtol": 1e-5, "atol": 2e-5} if precision == "float32" else {"rtol": 0.1, "atol": 1e-2}
    )
    chex.assert_trees_all_close(program(*inputs), gradient(params, tokens), **tolerance)
