"""Operands that are sharded under plain `jit`: results stay sharded, and few bytes move."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from references import FAST_METHODS, draw_model, draw_recurrence, first_id_loss, recurrence_loss

from benchmarks.train_steps import collectives
from simplernn_jax.ops import gated_linear_recurrence

B, T, H, K, V = 4, 24, 4, 3, 5
STATE_BYTES = B * H * K * V * 4


def mesh():
    return jax.make_mesh((2, 2, 2), ("x", "y", "z"), axis_types=(AxisType.Auto,) * 3)


def sharding(spec):
    return NamedSharding(mesh(), spec)


def shard(arrays, specs):
    return [jax.device_put(x, sharding(spec)) for x, spec in zip(arrays, specs, strict=True)]


def draw():
    def log_gates(rng, shape):
        return -0.1 * rng.exponential(size=shape)

    inputs, _ = draw_recurrence(B, T, H, K, V, log_gates=log_gates)
    ids = np.cumsum(np.random.default_rng(0).random((B, T)) < 0.1, axis=1)
    return *inputs, jnp.asarray(ids, jnp.int32)


def value_and_gradients(method, segments):
    def total(*inputs):
        return recurrence_loss(*inputs[: 5 + segments], method=method)

    return jax.jit(jax.grad(total, (0, 1, 2, 3, 4), has_aux=True))


@functools.cache
def by_scan(segments):
    return value_and_gradients("scan", segments)(*draw())


@pytest.mark.parametrize("method", FAST_METHODS)
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
    specs = [P(batch, time, heads)] * 4 + [P(batch, heads), P(batch, time)]
    sharded = shard(draw(), specs)
    program = value_and_gradients(method, segments).lower(*sharded).compile()
    gradients, (output, state) = program(*sharded)
    chex.assert_trees_all_close(
        (gradients, (output, state)), by_scan(segments), rtol=2e-4, atol=2e-4
    )
    for result, spec in zip(
        (*gradients, output, state), [*specs[:5], specs[0], specs[4]], strict=True
    ):
        assert result.sharding.is_equivalent_to(sharding(spec), result.ndim)
    moved = collectives(program.as_text())
    if time is None:
        assert not moved
    else:  # states, decays and resets of sequence shards; never activations
        assert moved
        shards = 4 if isinstance(time, tuple) else 2
        assert max(size for _, size in moved) <= shards * STATE_BYTES
        assert not any(kind == "all-gather" and size >= output.nbytes for kind, size in moved)


@pytest.mark.parametrize("method", FAST_METHODS)
def test_differently_sharded_operands(method):
    # "x" shards the batch of q and the time of k: XLA reshards one of them.
    specs = [P("x"), P(None, "x"), P(None, "y"), P("y"), P(None, "x"), P("z", "y")]
    found = value_and_gradients(method, True)(*shard(draw(), specs))
    chex.assert_trees_all_close(found, by_scan(True), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("method", FAST_METHODS)
def test_shards_of_unequal_length(method):
    """XLA pads the last shard, with results of earlier operations on zeros."""
    uneven = sharding(P(None, ("x", "y")))

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
        value_and_gradients(lambda x: jax.lax.with_sharding_constraint(x, uneven), method)(*inputs),
        value_and_gradients(lambda x: x, "scan")(*inputs),
        rtol=2e-4,
        atol=2e-4,
    )


@pytest.mark.parametrize(
    ("precision", "spec"),
    [
        ("float32", P(("x", "y", "z"))),
        ("bfloat16", P(("x", "y", "z"))),
        ("float32", P("x", ("y", "z"))),
    ],
    ids=["batch", "batch-bfloat16", "time"],
)
def test_the_model_stays_sharded(precision, spec):
    run, params, tokens = draw_model(precision, 8, 128)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params, tokens):
        logits, state = run(params, tokens)
        return first_id_loss(logits), state

    inputs = jax.device_put(params, sharding(P())), jax.device_put(tokens, sharding(spec))
    program = gradient.lower(*inputs).compile()
    found = collectives(program.as_text())
    if len(spec) == 1:  # sums of the gradients only
        assert {kind for kind, _ in found} == {"all-reduce"}
    # Less than a device's activations of one layer.
    assert all(kind == "all-reduce" or size < 4 * 128 * 32 * 4 for kind, size in found)
    # Partitioned sums round in another order; in bfloat16, results may differ in the last bit.
    rtol, atol = (1e-5, 2e-5) if precision == "float32" else (0.1, 1e-2)
    chex.assert_trees_all_close(program(*inputs), gradient(params, tokens), rtol=rtol, atol=atol)


@pytest.mark.parametrize("method", FAST_METHODS)
def test_operands_on_an_explicit_mesh_are_refused(method):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    inputs = [jax.device_put(x, NamedSharding(mesh, P("x"))) for x in draw()[:4]]
    run = functools.partial(gated_linear_recurrence, method=method)
    for call in (run, jax.jit(run), jax.grad(lambda *inputs: run(*inputs)[0].sum())):
        with pytest.raises(ValueError, match=r"over explicit axes.* axis_types=\(.*Auto"):
            call(*inputs)
