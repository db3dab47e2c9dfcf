"""The fused recurrence: where it is used, what it works with, and what happens without a compiler.

Its results and gradients are tested with those of the other ways, in test_ops.py.
"""

import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from simplernn_jax.cache_folder import cache_folder
from simplernn_jax.ops import gated_linear_recurrence, native
from simplernn_jax.ops.native import can_call, has_native_functions

needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None, reason="without a C compiler the recurrence runs in chunks"
)


def draw(*shape, value_dim=5):
    rng = np.random.default_rng(0)
    batch, length, heads, _ = shape
    q, k = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    v = jnp.asarray(rng.normal(size=(batch, length, heads, value_dim)), jnp.float32)
    log_gate = jnp.asarray(-rng.exponential(size=shape), jnp.float32)
    return q, k, v, log_gate


def loss(q, k, v, log_gate, **options):
    output, state = gated_linear_recurrence(q, k, v, log_gate, **options)
    return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.cos(state))


gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)), static_argnames=("method", "chunk_size"))


def assert_close(actual, expected):
    for ours, reference in zip(actual, expected, strict=True):
        assert jnp.linalg.norm(ours - reference) <= 1e-5 * jnp.linalg.norm(reference)


@needs_compiler
def test_it_is_used_where_nothing_else_is_asked_for():
    inputs = draw(2, 7, 3, 5)

    def program(**options):
        return jax.jit(lambda *x: gradients(*x, **options)).lower(*inputs).as_text()

    assert can_call(jnp.float32)
    assert native.FORWARD in program()
    assert native.BACKWARD in program()
    assert native.FORWARD not in program(chunk_size=8)
    assert not can_call(jnp.float64)


@needs_compiler
@pytest.mark.parametrize("width", [1, 16, 17, 47, 64])
def test_every_width_fills_its_vectors(width):
    """Tiles of 16 and 32 entries, full and not, on both axes of the state."""
    for inputs in (draw(2, 11, 2, width, value_dim=3), draw(2, 11, 2, 3, value_dim=width)):
        ours, expected = gradients(*inputs), gradients(*inputs, method="scan")
        assert_close(ours, expected)


@needs_compiler
@pytest.mark.parametrize(("length", "value_dim"), [(613, 64), (300, 4096)])
def test_long_rows_are_read_again_in_stretches(length, value_dim):
    """The gradient keeps the states of one stretch at a time; here there are several, chosen by
    what fits the cache and by the length of the row."""
    inputs = draw(1, length, 1, 3, value_dim=value_dim)
    ours, expected = gradients(*inputs), gradients(*inputs, method="scan")
    assert_close(ours, expected)


@needs_compiler
def test_the_same_input_gives_the_same_bytes():
    inputs = draw(5, 61, 3, 37, value_dim=41)
    run = jax.jit(gradients)
    first = run(*inputs)
    for _ in range(5):
        chex.assert_trees_all_equal(run(*inputs), first)


def test_vmap():
    inputs = [jnp.stack([x, 2 * x, x / 3]) for x in draw(2, 13, 3, 5, value_dim=7)]
    ids = jnp.asarray((np.arange(13) // 5 + np.zeros((2, 1))).astype(np.int32))

    def run(*inputs):
        return gradients(*inputs, segment_ids=ids)

    one_by_one = [run(*(x[i] for x in inputs)) for i in range(3)]
    expected = jax.tree.map(lambda *x: jnp.stack(x), *one_by_one)
    assert_close(jax.vmap(run)(*inputs), expected)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 8}, {"method": "scan"}], ids=str)
def test_inside_shard_map(options):
    """Rows and heads on different devices, with gradients, in every way of computing it."""
    mesh = jax.make_mesh((2, 4), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2)
    inputs = draw(4, 11, 8, 5)
    ids = jnp.asarray((np.arange(11) // 4 + np.zeros((4, 1))).astype(np.int32))

    def total(*inputs):
        return jax.lax.psum(loss(*inputs[:4], segment_ids=inputs[4], **options), mesh.axis_names)

    by_head = P("rows", None, "heads")
    specs = (by_head,) * 4 + (P("rows"),)
    sharded = jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=P())
    ours = jax.jit(jax.grad(sharded, argnums=(0, 1, 2, 3)))(*inputs, ids)
    expected = gradients(*inputs, segment_ids=ids, method="scan")
    assert_close(ours, expected)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_without_a_compiler(own_cache, monkeypatch, caplog):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert not has_native_functions.__wrapped__()
    assert "no C compiler (no-such-compiler)" in caplog.text
    monkeypatch.setattr(native, "has_native_functions", lambda: False)
    inputs = draw(3, 7, 2, 5)  # not traced before
    assert native.FORWARD not in jax.jit(gradients).lower(*inputs).as_text()


def test_a_compiler_that_fails(own_cache, monkeypatch, caplog):
    monkeypatch.setenv("CC", "false")
    assert not has_native_functions.__wrapped__()
    assert "could not be compiled" in caplog.text


@needs_compiler
def test_compiled_once_and_again_where_it_was_damaged(own_cache, monkeypatch):
    registered = []
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *x, **_: registered.append(x[0]))
    assert has_native_functions.__wrapped__()
    (library,) = cache_folder("native").glob("*.so")
    whole, made = library.read_bytes(), library.stat().st_ino
    assert has_native_functions.__wrapped__()
    assert library.stat().st_ino == made
    # A new file in its place: the old one is mapped by this process.
    library.unlink()
    library.write_bytes(whole[:1000])
    assert has_native_functions.__wrapped__()
    assert library.read_bytes() == whole
    assert registered == [*native.FUNCTIONS] * 3


@needs_compiler
def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *x, **_: None)
    assert has_native_functions.__wrapped__()
