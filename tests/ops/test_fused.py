"""The fused recurrence: where it is used, its shapes, `vmap` and `shard_map`.

test_ops.py compares its results and gradients with the definition.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from references import draw_recurrence, needs_compiler, recurrence_loss

from simplernn_jax.ops import native
from simplernn_jax.ops.native import supports_native


def draw(*shape, value_dim=5):
    return draw_recurrence(*shape, value_dim)[0][:4]


def loss(*inputs, **options):
    return recurrence_loss(*inputs, **options)[0]


gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)), static_argnames=("method", "chunk_size"))


def assert_close(actual, expected):
    for ours, reference in zip(actual, expected, strict=True):
        assert jnp.linalg.norm(ours - reference) <= 1e-5 * jnp.linalg.norm(reference)


@needs_compiler
def test_is_the_default():
    inputs = draw(2, 7, 3, 5)

    def program(**options):
        return jax.jit(lambda *x: gradients(*x, **options)).lower(*inputs).as_text()

    assert supports_native(jnp.float32)
    assert native.RECURRENCE_FORWARD in program()
    assert native.RECURRENCE_BACKWARD in program()
    assert native.RECURRENCE_FORWARD not in program(chunk_size=8)
    assert not supports_native(jnp.float64)


@needs_compiler
@pytest.mark.parametrize(
    ("keys", "values"), [(1, 64), (13, 29), (16, 47), (17, 1), (29, 13), (47, 16), (64, 17)]
)
def test_heads_of_any_width(keys, values):
    """Tiles of one and two vectors of 4 to 16 entries, full and partial, along both axes."""
    inputs = draw(2, 11, 2, keys, value_dim=values)
    assert_close(gradients(*inputs), gradients(*inputs, method="scan"))


@needs_compiler
@pytest.mark.parametrize(("length", "keys", "value_dim"), [(613, 29, 64), (300, 3, 4096)])
def test_gradient_of_long_sequences(length, keys, value_dim):
    """The gradient recomputes states in several blocks, by the cache's size and by the length."""
    inputs = draw(1, length, 1, keys, value_dim=value_dim)
    assert_close(gradients(*inputs), gradients(*inputs, method="scan"))


@needs_compiler
def test_is_deterministic():
    inputs = draw(5, 61, 3, 37, value_dim=41)
    run = jax.jit(gradients)
    first = run(*inputs)
    for _ in range(5):
        chex.assert_trees_all_equal(run(*inputs), first)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 8}, {"method": "scan"}], ids=str)
def test_inside_shard_map(options):
    mesh = jax.make_mesh((2, 4), ("data", "heads"), axis_types=(AxisType.Auto,) * 2)
    inputs = draw(4, 11, 8, 5)
    ids = jnp.asarray((np.arange(11) // 4 + np.zeros((4, 1))).astype(np.int32))

    def total(*inputs):
        return jax.lax.psum(loss(*inputs[:4], segment_ids=inputs[4], **options), mesh.axis_names)

    by_head = P("data", None, "heads")
    specs = (by_head,) * 4 + (P("data"),)
    sharded = jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=P())
    ours = jax.jit(jax.grad(sharded, argnums=(0, 1, 2, 3)))(*inputs, ids)
    expected = gradients(*inputs, segment_ids=ids, method="scan")
    assert_close(ours, expected)


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(native, "has_native_functions", lambda: False)
    inputs = draw(3, 7, 2, 5)  # not traced before
    assert native.RECURRENCE_FORWARD not in jax.jit(gradients).lower(*inputs).as_text()
