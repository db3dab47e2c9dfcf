"""The matmul of a dense layer: values, gradients, dtypes, and transposes around it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simplernn_jax.ops import matmul
from simplernn_jax.ops.matmul import fused_matmul

SHAPES = [(37, 5, 13), (37, 13, 5), (2 * 160, 64, 259), (2, 32 * 37, 160, 96)]
"""Of x, and the width of the result. The C functions take the last two: their tiles of 32 x 32 are
not full at the end, and the last has more than one block of tokens."""


@pytest.fixture(autouse=True, params=[(1, True), (1, False), (8, False)], ids=str)
def _devices(request, monkeypatch):
    """Constrain layouts, as on one device, or not; multiply bfloat16, or upcast it."""
    devices, fast_bfloat16 = request.param
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    monkeypatch.setattr(matmul, "has_fast_bfloat16", lambda: fast_bfloat16)


def draw(shape, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape[:-1])
    kernel = rng.normal(size=shape[-2:]) / np.sqrt(shape[-2])
    gradient = rng.normal(size=(*shape[:-2], shape[-1]))
    return tuple(jnp.asarray(a, dtype) for a in (x, kernel, gradient))


def results(call, x, kernel, gradient):
    y, pullback = jax.vjp(call, x, kernel)
    return y, *pullback(gradient)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "limit"), [(jnp.float64, 1e-12), (jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)]
)
def test_rounds_operands_and_sums_in_float32_or_more(shape, dtype, limit):
    with jax.enable_x64(dtype == jnp.float64):
        wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
        inputs = draw(shape, wide)
        ours = jax.jit(lambda *a: results(lambda x, w: fused_matmul(x, (w,), dtype)[0], *a))(
            *inputs
        )
        for result, exact in zip(ours, results(jnp.dot, *inputs), strict=True):
            assert result.dtype == wide
            assert jnp.linalg.norm(result - exact) <= limit * jnp.linalg.norm(exact)
        rounded = [a.astype(dtype).astype(wide) for a in inputs]
        chex.assert_trees_all_close(ours, results(jnp.dot, *rounded), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("squared_relu", [False, True])
def test_several_kernels(shape, x_dtype, squared_relu):
    """Up to the order of sums; an output of squared ReLU is itself rounded to 8 bits."""
    x, kernel, gradient = draw(shape)
    x, kernels = x.astype(x_dtype), (kernel, 2 * kernel[:, ::-1], kernel[:, :1])
    out_dtype = jnp.bfloat16 if squared_relu else jnp.float32
    gradients = [g.astype(out_dtype) for g in (gradient, gradient[..., ::-1], gradient[..., :1])]

    def rounded(x):
        return x.astype(jnp.bfloat16).astype(jnp.float32)

    def exact(x, kernels):
        outputs = [jnp.dot(rounded(x), rounded(w), precision="highest") for w in kernels]
        return [jnp.square(jax.nn.relu(y)) for y in outputs] if squared_relu else outputs

    @jax.jit
    def ours(x, kernels, gradients):
        y, pullback = jax.vjp(
            lambda *a: fused_matmul(*a, jnp.bfloat16, squared_relu=squared_relu), x, kernels
        )
        return y, *pullback(tuple(gradients))

    y, d_x, d_kernels = ours(x, kernels, gradients)
    assert all(each.dtype == out_dtype for each in y)
    assert d_x.dtype == x_dtype
    expected, pullback = jax.vjp(exact, x.astype(jnp.float32), kernels)
    expected = expected, *pullback([rounded(g) for g in gradients])
    limit = 1e-2 if squared_relu else 5e-3
    for result, truth in zip(*map(jax.tree.leaves, ((y, d_x, d_kernels), expected)), strict=True):
        chex.assert_shape(result, truth.shape)
        assert jnp.linalg.norm(result.astype(jnp.float32) - truth) <= limit * jnp.linalg.norm(truth)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2048])
def test_transposed_operands(dtype, tokens):
    """XLA's CPU backend has no matmul of transposed bfloat16 operands."""

    def loss(x, kernel):
        y = fused_matmul(x.T, (kernel.T,), dtype)[0]
        return jnp.sum(jnp.sin(y.T @ y))

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, tokens)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(96, 64)), jnp.float32)
    gradients = jax.jit(lambda *a: [g.T for g in jax.grad(loss, (0, 1))(*a)])(x, kernel)
    chex.assert_tree_all_finite(gradients)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_second_derivatives(dtype):
    x, kernel, _ = draw((37, 5, 13))

    def products(multiply):
        def along(x, kernel):
            gradients = jax.grad(lambda *a: jnp.sum(jnp.sin(multiply(*a))), (0, 1))(x, kernel)
            return sum(jnp.sum(jnp.cos(gradient)) for gradient in gradients)

        reverse = jax.grad(along, (0, 1))(x, kernel)
        return reverse, jax.jvp(along, (x, kernel), (x, kernel))[1]

    ours = products(lambda x, kernel: fused_matmul(x, (kernel,), dtype)[0])
    tolerance = 1e-4 if dtype == jnp.float32 else 0.2
    chex.assert_trees_all_close(ours, products(jnp.dot), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)], ids=str)
def test_vmap_of_gradient(axes, dtype):
    """XLA's CPU backend aborts where a batched matmul has a constrained layout."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-3, 4, (3, 4, 5)), jnp.float32)  # exact in bfloat16
    kernel = jnp.asarray(rng.integers(-3, 4, (3, 5, 6)), jnp.float32)
    inputs = [a if axis == 0 else a[0] for a, axis in zip((x, kernel), axes, strict=True)]

    def gradients(multiply):
        return jax.vmap(jax.grad(lambda *a: jnp.sum(multiply(*a)), (0, 1)), axes)(*inputs)

    chex.assert_trees_all_equal(
        gradients(lambda x, kernel: fused_matmul(x, (kernel,), dtype)[0]), gradients(jnp.matmul)
    )


@pytest.mark.parametrize(
    ("shape", "width"), [((0, 5), 3), ((2, 0, 5), 3), ((2, 0), 3), ((2, 5), 0)]
)
def test_empty_arrays(shape, width):
    kernels = jnp.ones((shape[-1], width)), jnp.ones((shape[-1], 4))

    def total(x, kernels):
        return sum(jnp.sum(y) for y in fused_matmul(x, kernels, jnp.bfloat16))

    gradients = jax.grad(total, (0, 1))(jnp.ones(shape), kernels)
    chex.assert_trees_all_equal_shapes(gradients, (jnp.ones(shape), kernels))
