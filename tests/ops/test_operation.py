"""The recurrence and the model under the transformations of JAX; the C kernel's shapes; errors.

Every method is compared with ``method="scan"``, which JAX transforms itself.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from references import FAST_METHODS, draw_model, draw_recurrence, needs_compiler, recurrence_loss

from simplernn_jax.ops import gated_linear_recurrence, native
from simplernn_jax.ops.attention import apply_rope, sliding_attention
from simplernn_jax.ops.matmul import fused_matmul
from simplernn_jax.ops.rms_norm import rms_norm_convolution

TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}
IDS = jnp.asarray([[0, 0, 1, 1, 1], [4, 4, 4, 4, 2]], jnp.int32)


def draw():
    return draw_recurrence(2, 5, 3, 2, 7)[0]


def recurrence(method):
    return functools.partial(references.recurrence, segment_ids=IDS, method=method)


def loss(method):
    return lambda *inputs: recurrence_loss(*inputs, segment_ids=IDS, method=method)[0]


def forward_mode(method):
    tangents = tuple(jnp.cos(x) for x in draw())
    return lambda *inputs: jax.jvp(recurrence(method), inputs, tangents)[1]


def hessian_of_gates(method):
    return jax.hessian(loss(method), argnums=3)


def reverse_over_reverse(method):
    def penalty(*inputs):
        gradients = jax.grad(loss(method), (0, 1, 2, 3, 4))(*inputs)
        return sum(jnp.sum(jnp.square(x)) for x in gradients)

    return jax.grad(penalty, (0, 1, 2, 3, 4))


def rematerialized(method):
    policy = jax.checkpoint_policies.dots_saveable
    return jax.grad(jax.checkpoint(loss(method), policy=policy), (0, 3))


def inside_scan(method):
    def three_times(*inputs):
        def step(state, _):
            return recurrence(method)(*inputs[:4], state)[1], None

        return jnp.sum(jnp.sin(jax.lax.scan(step, inputs[4], length=3)[0]))

    return jax.grad(three_times, (1, 3, 4))


def gradient_of_vmap(method):
    def total(q, k, v, log_gate, state):
        run = jax.vmap(recurrence(method), in_axes=(0, None, None, 1, None))
        output, states = run(jnp.stack([q, 2 * q]), k, v, jnp.stack([log_gate] * 2, 1), state)
        return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.cos(states))

    return jax.grad(total, (0, 1, 2, 3, 4))


def vmap_of_gradient(method):
    def run(*inputs):
        gradients = jax.vmap(jax.grad(loss(method), (0, 4)), in_axes=(0, None, None, None, 0))
        return gradients(jnp.stack([inputs[0]] * 3), *inputs[1:4], jnp.stack([inputs[4]] * 3))

    return run


FIRST_ORDER = [forward_mode, gradient_of_vmap, inside_scan, vmap_of_gradient, rematerialized]
OTHERS = [hessian_of_gates, reverse_over_reverse]


# Higher orders use the definition for any method.
@pytest.mark.parametrize(
    ("transformed", "methods"),
    [(f, ("auto", "chunkwise")) for f in FIRST_ORDER] + [(f, ("auto",)) for f in OTHERS],
)
def test_transformation_equals_that_of_scan(transformed, methods):
    inputs = draw()
    expected = jax.jit(transformed("scan"))(*inputs)
    for method in methods:
        ours = jax.jit(transformed(method))(*inputs)
        chex.assert_trees_all_close(ours, expected, **TOLERANCE)


def test_vmap_is_one_call():
    inputs = jax.tree.map(lambda x: jnp.stack([x, 2 * x, x / 3]), draw())
    run = jax.jit(jax.vmap(jax.grad(loss("auto"))))
    for name in ("simplernn_forward", "simplernn_backward"):
        calls = run.lower(*inputs).as_text().count(f"custom_call @{name}(")
        assert calls <= 1


@pytest.mark.parametrize("method", ["auto", *FAST_METHODS])
def test_lowers_for_each_platform(method):
    traced = jax.jit(jax.grad(loss(method), (0, 3))).trace(*draw())
    for platform in ("cuda", "tpu"):
        assert "custom_call" not in traced.lower(lowering_platforms=(platform,)).as_text()
    here = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert ("simplernn_backward" in here) == (
        method == "fused" or (native.supports_native(jnp.float32) and method == "auto")
    )


def test_exports_with_symbolic_shapes():
    b, t = jax.export.symbolic_shape("b, t")
    q, k, v, log_gate, _ = draw()
    shapes = [jax.ShapeDtypeStruct((b, t, *x.shape[2:]), x.dtype) for x in (q, k, v, log_gate)]

    def total(q, k, v, log_gate):
        return jnp.sum(jnp.sin(gated_linear_recurrence(q, k, v, log_gate)[0]))

    run = jax.jit(jax.value_and_grad(total, (0, 3)))
    exported = jax.export.export(run, platforms=("cpu", "cuda"))(*shapes)
    for inputs in ((q, k, v, log_gate), [x[:1, :3] for x in (q, k, v, log_gate)]):
        chex.assert_trees_all_close(exported.call(*inputs), run(*inputs), **TOLERANCE)


def draw_model_of(precision):
    # A new function per test, since traces depend on the number of devices. Enough tokens for the C
    # functions to be used.
    sizes = {"num_layers": 1, "num_heads": 1, "key_dim": 34, "value_dim": 38, "mlp_dim": 37}
    return draw_model(precision, 2, 256, **sizes)


@pytest.mark.parametrize(("precision", "devices"), [("bfloat16", 1), ("float32", 8)])
def test_exports_the_model_for_all_platforms(monkeypatch, precision, devices):
    monkeypatch.setattr(jax, "device_count", lambda: devices)  # 1: constrained layouts
    run, params, tokens = draw_model_of(precision)
    run = jax.jit(run)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    symbolic = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, t"), jnp.int32)
    exported = jax.export.export(run, platforms=("cpu", "cuda", "tpu"))(shapes, symbolic)
    assert not re.search(r"custom_call @(simplernn|LayoutConstraint)", exported.mlir_module())
    chex.assert_trees_all_close(
        exported.call(params, tokens),
        run(params, tokens),
        rtol=0,
        atol=1e-4 if precision == "float32" else 0.05,
    )


def draw_arrays(*shape):
    return draw_recurrence(*shape)[0][:4]


@functools.partial(jax.jit, static_argnames=("method", "chunk_size"))
@functools.partial(jax.grad, argnums=(0, 1, 2, 3))
def gradients(*inputs, **options):
    return recurrence_loss(*inputs, **options)[0]


def assert_close(actual, expected):
    for ours, reference in zip(actual, expected, strict=True):
        assert jnp.linalg.norm(ours - reference) <= 1e-5 * jnp.linalg.norm(reference)


@needs_compiler
@pytest.mark.parametrize(
    ("length", "keys", "values"),
    [(11, 1, 64), (11, 13, 29), (11, 47, 16), (11, 64, 17), (613, 29, 64), (300, 3, 4096)],
)
def test_the_c_kernel_takes_any_width_and_length(length, keys, values):
    """Tiles of one and two vectors of 4 to 16 entries, full and partial, along both axes; states
    that are recomputed in several blocks, by the cache's size and by the length."""
    inputs = draw_arrays(2 if length == 11 else 1, length, 2 if length == 11 else 1, keys, values)
    assert_close(gradients(*inputs), gradients(*inputs, method="scan"))


@needs_compiler
def test_the_c_kernel_is_deterministic():
    inputs = draw_arrays(5, 61, 3, 37, 41)
    first = gradients(*inputs)
    for _ in range(5):
        chex.assert_trees_all_equal(gradients(*inputs), first)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 8}, {"method": "scan"}], ids=str)
def test_inside_shard_map(options):
    mesh = jax.make_mesh((2, 4), ("data", "heads"), axis_types=(AxisType.Auto,) * 2)
    inputs = draw_arrays(4, 11, 8, 5, 5)
    ids = jnp.asarray((np.arange(11) // 4 + np.zeros((4, 1))).astype(np.int32))

    def total(*inputs):
        found, _ = recurrence_loss(*inputs[:4], segment_ids=inputs[4], **options)
        return jax.lax.psum(found, mesh.axis_names)

    by_head = P("data", None, "heads")
    specs = (by_head,) * 4 + (P("data"),)
    sharded = jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=P())
    ours = jax.jit(jax.grad(sharded, argnums=(0, 1, 2, 3)))(*inputs, ids)
    assert_close(ours, gradients(*inputs, segment_ids=ids, method="scan"))


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(native, "has_native_functions", lambda: False)
    inputs = draw_arrays(3, 7, 2, 5, 5)  # not traced before
    assert "simplernn_forward" not in jax.jit(gradients).lower(*inputs).as_text()


ONES = jnp.ones((2, 3, 2, 3))  # B T H K


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": ONES[:, :2]}, r"k: expected \[B, T, H, K\] with B"),
        ({"v": ONES[:, :2]}, r"v: expected \[B, T, H, V\]"),
        ({"initial_state": ONES[..., :2]}, r"initial_state: expected \[B, H, K, V\]"),
        ({"segment_ids": IDS[:, :2]}, r"segment_ids: expected \[B, T\]"),
        ({"method": "fast"}, "method='fast'"),
        ({"chunk_size": 24}, "chunk_size=24: .* power of"),
        ({"method": "scan", "chunk_size": 16}, "chunk_size=16: method='scan' has no chunks"),
    ],
)
def test_a_wrong_argument_of_the_recurrence_is_named(wrong, message):
    right = {"q": ONES, "k": ONES, "v": ONES, "log_gate": -ONES}
    with pytest.raises(ValueError, match=f"^{message}"):
        gated_linear_recurrence(**(right | wrong))


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (apply_rope, (ONES, IDS[:, :3]), "x: expected .* with an even K; got K = 3"),
        (sliding_attention, (ONES, ONES, ONES, IDS[:, :3], 0), "context: expected at least 1"),
        (
            sliding_attention,
            (ONES, ONES[:, :2], ONES[:, :2], IDS[:, :3], 1),
            "k: expected .* T = 3; got S =",
        ),
        (
            rms_norm_convolution,
            (ONES[..., 0], jnp.ones((0, 2)), None, None),
            "weights: expected .* W of at least 1; got W = 0",
        ),
        (fused_matmul, (ONES, [], None), "kernels: expected at least one; got none"),
    ],
)
def test_a_wrong_argument_of_another_operation_is_named(function, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        function(*arguments)
