"""Matmul of a dense layer and its gradient: operands in one dtype, sums in float32.

On one device tokens are flattened, so that the gradient of a kernel contracts one axis. XLA's CPU
backend has a fast matmul for row-major ``[m, k] [k, n]`` only: the gradient of a kernel, x^T g,
contracts the leading axis of both and takes up to twice as long, and in bfloat16 any transposed
operand loses the speedup (measured: ``[4096, 128] [128, 512]`` and its transpose). So the gradient
first transposes the smaller operand, in a way that XLA does not fold into the matmul. Where the
processor multiplies bfloat16 no faster than float32, rounded operands are multiplied as float32;
where it does, and there is a C compiler, C functions pack and multiply (`cpu/matmul.c`).
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from simplernn_jax.ops.checks import FLOATING, accumulator_dtype, check_array, check_dtype
from simplernn_jax.ops.native import call_native, has_fast_bfloat16, has_native_bfloat16
from simplernn_jax.ops.primitive import Operation, is_static, on_one_device


def fused_matmul(
    x: jax.Array, kernels: Sequence[jax.Array], dtype: Any, *, squared_relu: bool = False
) -> tuple[jax.Array, ...]:
    """Compute `x` ``[..., in]`` times each kernel ``[in, out]``, as one matmul of `dtype` operands.

    Results are ``[..., out]``, float32 (float64 if `dtype` is). With `squared_relu` they are
    ``max(x W, 0)^2`` (Primer, arXiv:2109.08668, section 4.1) in `dtype`, ready for the next matmul;
    their gradient, ``2 max(x W, 0)``, is computed from the square root of the result, so that the
    widest activation of a layer need not be saved.
    """
    if not kernels:
        raise ValueError("kernels: expected at least one; got none")
    sizes = check_array("x", x, "... in")
    for kernel in kernels:
        check_array("kernel", kernel, "in out", FLOATING, {"in": sizes["in"]})
    check_dtype("dtype", dtype)
    x, *kernels = map(jnp.asarray, (x, *kernels))  # without x64, float64 becomes float32
    dtype = jnp.dtype(dtype)
    on_cpu = _cpu_backend(dtype, x, kernels)
    operation = _operation(dtype, x.dtype, len(kernels), squared_relu, on_one_device(), on_cpu)
    return tuple(operation(*kernels, x))


def merge_tokens(x: jax.Array) -> jax.Array:
    """Return ``[tokens, D]`` if the program runs on one device, else `x` ``[..., D]`` unchanged.

    It saves memory: XLA then keeps one layout of the activations between two matmuls.
    """
    return _merged(x) if on_one_device() else x


def _merged(x: jax.Array) -> jax.Array:
    # Not -1, which is ambiguous for an empty array.
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _cpu_backend(dtype: Any, x: jax.Array, kernels: Sequence[jax.Array]) -> "_XLA | _InC":
    """Choose how a CPU multiplies."""
    if not on_one_device():
        return _XLA(upcast=True)
    sizes = (*x.shape, *(kernel.shape[1] for kernel in kernels))
    if (
        dtype == jnp.bfloat16
        and x.dtype in (jnp.float32, jnp.bfloat16)
        and all(kernel.dtype == jnp.float32 for kernel in kernels)
        and len(kernels) <= _MOST_KERNELS
        and is_static(sizes)
        and math.prod(sizes)
        and x.shape[-1] % _ALIGNED == math.prod(x.shape[:-1]) % _ALIGNED == 0
        and has_native_bfloat16()
    ):
        return _InC()
    upcast = dtype == jnp.bfloat16 and not has_fast_bfloat16()
    return _XLA(merge=True, row_major=True, upcast=upcast)


@functools.cache
def _operation(
    dtype: Any,
    x_dtype: Any,
    count: int,
    squared_relu: bool,
    one_device: bool,
    on_cpu: "_XLA | _InC",
) -> Operation:
    """Build the operation (*kernels, x) to outputs; the gradient reads x in `dtype`."""

    def default(backend: "_XLA | _InC", *args: jax.Array) -> Sequence[jax.Array]:
        return backend.forward(args[-1], args[:-1], dtype, squared_relu)[0]

    def fwd(backend: "_XLA | _InC", *args: jax.Array) -> Sequence[jax.Array]:
        y, low_x = backend.forward(args[-1], args[:-1], dtype, squared_relu)
        # The rounded x is half as large as x.
        return *y, *([] if dtype == x_dtype else [low_x]), *(y if squared_relu else [])

    def bwd(backend: "_XLA | _InC", *args: jax.Array) -> Sequence[jax.Array]:
        kernels, residuals, d_y = args[:count], args[count:-count], args[-count:]
        x, z = residuals[dtype != x_dtype], residuals[1 + (dtype != x_dtype) :]
        d_x, *d_kernels = backend.gradients(x, kernels, d_y, z, x_dtype)
        return *(d.astype(k.dtype) for d, k in zip(d_kernels, kernels, strict=True)), d_x

    def operation(function: Callable[..., Sequence[jax.Array]], **derivatives: Any) -> Operation:
        return Operation(
            partial(function, _XLA(merge=one_device)),
            partial(function, on_cpu),
            # XLA's CPU backend cannot multiply bfloat16 in every layout that it may choose.
            partial(function, _XLA(merge=one_device, upcast=True)),
            # XLA's CPU backend aborts where a batched matmul has a constrained layout (jax 0.10).
            cpu_supports_vmap=not one_device,
            **derivatives,
        )

    has_residuals = dtype != x_dtype or squared_relu
    return operation(default, fwd=operation(fwd) if has_residuals else None, bwd=operation(bwd))


class _InC(NamedTuple):
    """A C function multiplies operands rounded to bfloat16; sizes are multiples of `_ALIGNED`."""

    def forward(
        self, x: jax.Array, kernels: Sequence[jax.Array], dtype: Any, squared_relu: bool
    ) -> tuple[Sequence[jax.Array], jax.Array]:
        """Compute the outputs, and x in bfloat16."""
        flat = _merged(x)
        y_dtype = dtype if squared_relu else jnp.float32
        outputs = [jax.ShapeDtypeStruct((len(flat), w.shape[1]), y_dtype) for w in kernels]
        low_x = [] if x.dtype == dtype else [jax.ShapeDtypeStruct(flat.shape, dtype)]
        packed = _packed(sum(_padded(w.shape[1]) for w in kernels) * x.shape[-1])
        results = call_native("simplernn_dense_forward", [*outputs, *low_x, packed], flat, *kernels)
        y = [each.reshape(*x.shape[:-1], each.shape[-1]) for each in results[: len(kernels)]]
        return y, x if x.dtype == dtype else results[-2].reshape(x.shape)

    def gradients(
        self,
        x: jax.Array,
        kernels: Sequence[jax.Array],
        d_y: Sequence[jax.Array],
        z: Sequence[jax.Array],
        x_dtype: Any,
    ) -> Sequence[jax.Array]:
        """Compute the gradients of x, which is in bfloat16 here, and of the kernels.

        `z` are the outputs with squared ReLU, or empty.
        """
        flat = _merged(x)
        width = sum(_padded(w.shape[1]) for w in kernels)
        packed = _packed(x.shape[-1] * (len(flat) + width) + 2 * len(flat) * width)
        types: list[Any] = [jax.ShapeDtypeStruct(flat.shape, x_dtype), *kernels, packed]
        arguments = (flat, *kernels, *map(_merged, (*d_y, *z)))
        d_x, *d_kernels, _ = call_native("simplernn_dense_backward", types, *arguments)
        return d_x.reshape(x.shape), *d_kernels


_ALIGNED, _MOST_KERNELS = 32, 16
"""The same as in `matmul.c`."""


def _padded(width: int) -> int:
    return -(-width // _ALIGNED) * _ALIGNED


def _packed(entries: int) -> jax.ShapeDtypeStruct:
    """Memory for packed operands, two entries of bfloat16 per word."""
    return jax.ShapeDtypeStruct((entries // 2,), jnp.uint32)


class _XLA(NamedTuple):
    """XLA multiplies."""

    merge: bool = False
    """Merge the axes of tokens."""
    row_major: bool = False
    """Constrain layouts, so that XLA materializes transposed operands."""
    upcast: bool = False
    """Multiply in float32, with the same results."""

    def flat(self, x: jax.Array) -> jax.Array:
        """Merge the axes of tokens or not."""
        return _merged(x) if self.merge else x

    def forward(
        self, x: jax.Array, kernels: Sequence[jax.Array], dtype: Any, squared_relu: bool
    ) -> tuple[Sequence[jax.Array], jax.Array]:
        """Compute the outputs, and x in `dtype`."""
        low_x = x.astype(dtype)
        y = self.dot(self.flat(low_x), self.concatenate(kernels, dtype))
        if squared_relu:
            y = (y * jax.nn.relu(y)).astype(dtype)
        return _split(y.reshape(*x.shape[:-1], y.shape[-1]), _widths(kernels)), low_x

    def gradients(
        self,
        x: jax.Array,
        kernels: Sequence[jax.Array],
        d_y: Sequence[jax.Array],
        z: Sequence[jax.Array],
        x_dtype: Any,
    ) -> Sequence[jax.Array]:
        """Compute the gradients of x and of the kernels, with operands of the dtype of x."""
        if z:
            d_y = [_squared_relu_gradient(*each) for each in zip(z, d_y, strict=True)]
        joined = self.flat(self.concatenate(d_y, x.dtype))
        d_x = self.dot(joined, self.operand(self.concatenate(kernels, x.dtype)).T)
        d_kernels = _split(self.kernel_gradient(self.flat(x), joined), _widths(kernels))
        return d_x.astype(x_dtype).reshape(x.shape), *d_kernels

    def operand(self, x: jax.Array) -> jax.Array:
        """Prepare an operand."""
        if self.upcast:
            x = x.astype(accumulator_dtype(x))
        return with_layout_constraint(x, Layout((0, 1))) if self.row_major else x

    def dot(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Multiply matrices."""
        a, b = self.operand(a), self.operand(b)
        return jnp.dot(a, b, preferred_element_type=accumulator_dtype(a))

    def concatenate(self, arrays: Sequence[jax.Array], dtype: Any) -> jax.Array:
        """Concatenate arrays along the last axis, in a dtype."""
        low = [array.astype(dtype) for array in arrays]
        if len(low) == 1:
            return low[0]
        if not self.row_major or dtype != jnp.bfloat16:
            return jnp.concatenate(low, axis=-1)
        # XLA's CPU backend concatenates bfloat16 in float32, but not integers.
        bits = [jax.lax.bitcast_convert_type(array, jnp.uint16) for array in low]
        return jax.lax.bitcast_convert_type(jnp.concatenate(bits, axis=-1), jnp.bfloat16)

    def kernel_gradient(self, x: jax.Array, d_y: jax.Array) -> jax.Array:
        """Compute the gradient of the kernels from x and the cotangent of the result."""
        if not self.row_major:
            x, d_y = self.operand(x), self.operand(d_y)
            axes = tuple(range(x.ndim - 1))
            return jnp.tensordot(x, d_y, (axes, axes), preferred_element_type=accumulator_dtype(x))
        swap = x.shape[1] > d_y.shape[1]
        smaller, other = (d_y, x) if swap else (x, d_y)
        d_kernel = self.dot(self.operand(smaller).T, other)
        # The barrier keeps the transpose of this small result out of the matmul.
        d_kernel = jax.lax.optimization_barrier(d_kernel)
        return d_kernel.T if swap else d_kernel


def _squared_relu_gradient(z: jax.Array, d_z: jax.Array) -> jax.Array:
    root = jnp.sqrt(jnp.where(z > 0, z, 1).astype(accumulator_dtype(z)))
    return jnp.where(z > 0, 2 * root, 0) * d_z.astype(root.dtype)


def _widths(kernels: Sequence[jax.Array]) -> Sequence[int]:
    return [kernel.shape[1] for kernel in kernels]


def _split(y: jax.Array, widths: Sequence[int]) -> Sequence[jax.Array]:
    ends = itertools.accumulate(widths)
    return [y[..., end - width : end] for end, width in zip(ends, widths, strict=True)]
