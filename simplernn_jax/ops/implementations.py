"""Implementations of an operation, its gradient, and their transformations.

They are hashable, so that equal programs compile once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Implementation = Callable[..., Sequence[jax.Array]]
"""Function from arrays to a sequence of arrays."""

Types = tuple[tuple[tuple[int, ...], Any], ...]
"""Shapes and dtypes of arrays."""


@dataclasses.dataclass(frozen=True)
class Implementations:
    """Interchangeable implementations of one function, equal up to rounding."""

    default: Implementation
    """Implementation for any platform."""
    cpu: Implementation | None = None
    """Faster implementation for CPUs, if any."""
    reference: Implementation | None = None
    """Implementation that JAX differentiates; None if it can differentiate `default`."""
    partitioning_rule: Callable[[Implementation], Implementation] | None = None
    """Wrapper in `custom_partitioning`; None leaves sharded operands to XLA."""
    cpu_supports_vmap: bool = True
    """True if `vmap` may map `cpu`; otherwise it maps `differentiable` on CPUs."""

    @property
    def differentiable(self) -> Implementation:
        """Implementation that JAX differentiates, to any order."""
        return self.reference or self.default

    def map(self, transform: Callable[[Implementation], Implementation]) -> "Implementations":
        """Transform every implementation for `vmap`; XLA partitions the result."""
        cpu = self.cpu if self.cpu_supports_vmap or self.cpu is None else self.differentiable
        return Implementations(
            transform(self.default),
            None if cpu is None else transform(cpu),
            None if self.reference is None else transform(self.reference),
        )


@dataclasses.dataclass(frozen=True)
class VJP:
    """Reverse mode of an operation from the inputs x to the outputs y."""

    bwd: Implementations
    """(residuals, cotangents of y) to cotangents of the inputs, floating ones first."""
    fwd: Implementations | None = None
    """``fwd(*x)``: y and further residuals; None if there are none."""
    residual_types: Types = ()
    """Shapes and dtypes of these further residuals."""
    saved_inputs: tuple[int, ...] | None = None
    """Indices of the inputs that are residuals, before the further ones; None is all."""
    restore_inputs: Implementation | None = None
    """Residuals to x; None if the residuals begin with x."""


@dataclasses.dataclass(frozen=True)
class Linear:
    """An operation that is linear in its arguments after the first `num_residuals`."""

    num_residuals: int
    transpose: Implementations
    """(residuals, cotangents of the outputs) to the cotangents of the linear arguments."""


def as_list(impl: Implementation) -> Implementation:
    """Wrap `impl` to return a list, as JAX's transformations need one type of sequence."""
    return lambda *args: list(impl(*args))


@dataclasses.dataclass(frozen=True)
class Vmapped:
    """An implementation mapped over a leading axis.

    Results whose entry of `out_axes` is None are summed over it; if not `summed`, taken from index
    0.
    """

    impl: Implementation
    in_axes: tuple[int | None, ...]
    out_axes: tuple[int | None, ...] | None = None
    summed: bool = True

    def __call__(self, *args: jax.Array) -> Sequence[jax.Array]:
        """Compute the mapped implementation."""
        outputs = list(jax.vmap(as_list(self.impl), self.in_axes)(*args))
        for i, axis in enumerate(self.out_axes or ()):
            if axis is None and i < len(outputs):
                outputs[i] = jnp.sum(outputs[i], 0) if self.summed else outputs[i][0]
        return outputs


@dataclasses.dataclass(frozen=True)
class Linearized:
    """Derivative: (residuals, tangents of the inputs `wrt`) to tangents of the outputs.

    If `transposed`, (residuals, cotangents of the outputs) to cotangents of these inputs.
    """

    impl: Implementation
    restore_inputs: Implementation | None
    num_inputs: int
    num_residuals: int
    wrt: tuple[int, ...]
    transposed: bool = False

    def __call__(self, *args: jax.Array) -> Sequence[jax.Array]:
        """Compute the derivative at the residuals."""
        residuals, directions = args[: self.num_residuals], list(args[self.num_residuals :])
        inputs = residuals if self.restore_inputs is None else self.restore_inputs(*residuals)
        inputs = list(inputs[: self.num_inputs])

        def function(*some: jax.Array) -> Sequence[jax.Array]:
            values = list(inputs)
            for i, x in zip(self.wrt, some, strict=True):
                values[i] = x
            return list(self.impl(*values))

        values = [inputs[i] for i in self.wrt]
        if self.transposed:
            return jax.vjp(function, *values)[1](directions)
        return jax.jvp(function, values, directions)[1]
