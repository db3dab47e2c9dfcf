"""Forms of an operation, its gradient, and their transformations.

Forms are hashable, so that equal programs compile once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Form = Callable[..., Sequence[jax.Array]]
"""Function from arrays to a sequence of arrays."""

Types = tuple[tuple[tuple[int, ...], Any], ...]
"""Shapes and dtypes of arrays."""


@dataclasses.dataclass(frozen=True)
class Forms:
    """One function in several forms, equal but for rounding."""

    default: Form
    """Form for any platform."""
    cpu: Form | None = None
    """Faster form for CPUs, if any."""
    pure: Form | None = None
    """Form that JAX differentiates; None if it can differentiate `default`."""
    partitioned: Callable[[Form], Form] | None = None
    """Wrapper of a form in `custom_partitioning`; None leaves sharded operands to XLA."""
    vmaps_cpu: bool = True
    """Whether `vmap` may map `cpu`; if not, it maps `differentiable` on CPUs."""

    @property
    def differentiable(self) -> Form:
        """Form that JAX differentiates, to any order."""
        return self.pure or self.default

    def map(self, transform: Callable[[Form], Form]) -> "Forms":
        """Transform every form for `vmap`; XLA partitions the result."""
        cpu = self.cpu if self.vmaps_cpu or self.cpu is None else self.differentiable
        return Forms(
            transform(self.default),
            None if cpu is None else transform(cpu),
            None if self.pure is None else transform(self.pure),
        )


@dataclasses.dataclass(frozen=True)
class Gradient:
    """Reverse mode of an operation from the inputs x to the outputs y."""

    reverse: Forms
    """(residuals, cotangents of y) to the cotangents of the floating inputs, which come first."""
    forward: Forms | None = None
    """x to (y, extras); None if there are no extras."""
    extras: Types = ()
    """Shapes and dtypes of the residuals that `forward` computes."""
    kept: tuple[int, ...] | None = None
    """Indices of the inputs among the residuals, before the extras; None is all."""
    inputs: Form | None = None
    """Residuals to x; None if the residuals begin with x."""


@dataclasses.dataclass(frozen=True)
class Linear:
    """An operation that is linear in its arguments after the first `num_residuals`."""

    num_residuals: int
    transpose: Forms
    """(residuals, cotangents of the outputs) to the cotangents of the linear arguments."""


def as_list(form: Form) -> Form:
    """Make `form` return a list, as JAX's transformations need one type of sequence."""
    return lambda *args: list(form(*args))


@dataclasses.dataclass(frozen=True)
class Vmapped:
    """A form mapped over a leading axis.

    Results whose entry of `out_axes` is None are summed over it, or are those of its first entry.
    """

    form: Form
    in_axes: tuple[int | None, ...]
    out_axes: tuple[int | None, ...] | None = None
    summed: bool = True

    def __call__(self, *args: jax.Array) -> Sequence[jax.Array]:
        """Compute the mapped form."""
        outputs = list(jax.vmap(as_list(self.form), self.in_axes)(*args))
        for i, axis in enumerate(self.out_axes or ()):
            if axis is None and i < len(outputs):
                outputs[i] = jnp.sum(outputs[i], 0) if self.summed else outputs[i][0]
        return outputs


@dataclasses.dataclass(frozen=True)
class Linearized:
    """Derivative of a form: (residuals, tangents of the inputs `wrt`) to tangents of the outputs.

    If `transposed`, (residuals, cotangents of the outputs) to cotangents of these inputs.
    """

    form: Form
    inputs: Form | None
    num_inputs: int
    num_residuals: int
    wrt: tuple[int, ...]
    transposed: bool = False

    def __call__(self, *args: jax.Array) -> Sequence[jax.Array]:
        """Compute the derivative at the residuals."""
        residuals, directions = args[: self.num_residuals], list(args[self.num_residuals :])
        inputs = residuals if self.inputs is None else self.inputs(*residuals)
        inputs = list(inputs[: self.num_inputs])

        def function(*some: jax.Array) -> Sequence[jax.Array]:
            values = list(inputs)
            for i, x in zip(self.wrt, some, strict=True):
                values[i] = x
            return list(self.form(*values))

        values = [inputs[i] for i in self.wrt]
        if self.transposed:
            return jax.vjp(function, *values)[1](directions)
        return jax.jvp(function, values, directions)[1]
