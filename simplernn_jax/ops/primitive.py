"""A JAX primitive with implementations per platform and rules for every transformation.

An operation has a reference implementation, which JAX can transform, and fast ones of it and of its
gradient that JAX cannot differentiate (C functions, loops with a custom gradient):

- lowering selects the CPU implementation on a CPU, and the default elsewhere and in `jax.export`:
  exported programs have no custom calls;
- reverse mode uses the fast gradient, forward mode and higher orders the reference;
- `vmap` maps the implementation that is lowered;
- operands that are sharded under `jit` are partitioned by the operation's rule.

`jax.custom_vjp` with `jax.lax.platform_dependent` and `jax.ffi` would not suffice: functions with a
custom VJP have no forward mode, a program exported for CPUs would contain custom calls, and
`custom_partitioning`, which sharded operands need, has no rules for `vmap` and derivatives.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

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


def varying(x: jax.Array | jax.ShapeDtypeStruct) -> frozenset[str]:
    """Return the manual mesh axes over which `x` varies."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary_like(x: jax.Array, *others: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """Cast `x` to vary over every manual mesh axis that it or one of `others` varies over.

    The carry of a loop must have one type: its initial zeros are the same on every device, its next
    value is not. The gradient of the cast sums over the devices: one cast before several uses of an
    array takes one all-reduce for all their gradients.
    """
    return vary_over(x, frozenset[str]().union(*map(varying, others)))


def vary_over(x: jax.Array, names: frozenset[str]) -> jax.Array:
    """Cast `x` to vary over the manual mesh axes `names` too."""
    missing = tuple(sorted(names - varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def apply(
    impls: Implementations,
    inputs: Sequence[jax.Array],
    outputs: Sequence[Any],
    vjp: VJP | None = None,
) -> list[jax.Array]:
    """Apply an operation.

    Args:
      impls: implementations of the operation.
      inputs: arrays; the floating ones are differentiated.
      outputs: arrays or structs with the shape and dtype of each result.
      vjp: reverse mode; None differentiates the reference.
    """
    inputs = [vary_like(x, *inputs) for x in inputs]  # one type inside `shard_map`
    return _bind(inputs, impls, _types(outputs), vjp)


def as_function(impls: Implementations) -> Implementation:
    """Return a function that dispatches per platform and leaves partitioning to XLA."""
    impls = dataclasses.replace(impls, partitioning_rule=None)

    def run(*args: jax.Array) -> Sequence[jax.Array]:
        return _bind(args, impls, _types(jax.eval_shape(impls.differentiable, *args)))

    return run


def is_static(shape: Sequence[Any]) -> bool:
    """Return whether `shape` has no dimension that `jax.export` leaves symbolic."""
    return all(isinstance(size, int) for size in shape)


def on_one_device() -> bool:
    """Return whether this code runs on one device, alone or inside `shard_map`.

    If not, XLA may have to partition it: axes of tokens are then not merged, and no layout is
    constrained, since jax 0.10 (not 0.12) gathers arrays with constrained layouts.
    """
    return jax.device_count() == 1 or bool(jax.sharding.get_abstract_mesh().manual_axes)


_operation = Primitive("simplernn_operation")
_operation.multiple_results = True


def _bind(
    args: Sequence[Any],
    impls: Implementations,
    results: Types,
    vjp: VJP | None = None,
    linear: Linear | None = None,
) -> list[Any]:
    for x in args:
        spec = jax.typeof(x).sharding.spec
        if any(axis is not None for axis in spec):
            raise ValueError(
                f"an array of shape {x.shape} is sharded as {spec} over explicit axes, which have "
                "no rules here; create the mesh with axis_types=(jax.sharding.AxisType.Auto, ...)"
            )
    params = {"impls": impls, "results": results, "vjp": vjp, "linear": linear}
    return _operation.bind(*args, partitioned=_partitioned(args, impls), **params)


def _partitioned(args: Sequence[Any], impls: Implementations) -> Any:
    """Trace the operation inside `custom_partitioning`, if there are several devices.

    The jaxpr is a parameter of the primitive, since `custom_partitioning` has no rules for `vmap`
    and derivatives.
    """
    if impls.partitioning_rule is None or on_one_device():
        return None
    return _partitioned_jaxpr(impls, _types(args), jax.config.jax_enable_x64)  # type: ignore[attr-defined, unused-ignore]


@functools.lru_cache(maxsize=256)
def _partitioned_jaxpr(impls: Implementations, types: Types, x64: bool) -> Any:
    del x64  # a key of the cache
    assert impls.partitioning_rule is not None
    structs = [jax.ShapeDtypeStruct(*each) for each in types]
    return jax.make_jaxpr(impls.partitioning_rule(as_function(impls)))(*structs)


def _types(arrays: Sequence[Any]) -> Types:
    return tuple((x.shape, np.dtype(x.dtype)) for x in arrays)


@functools.lru_cache(maxsize=1024)
def _compiled(**params: Any) -> Callable[..., Any]:
    return jax.jit(functools.partial(_operation.bind, **params))


@_operation.def_impl
def _impl(*args: jax.Array, partitioned: Any, **params: Any) -> Any:
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined, unused-ignore]
        impls = params["impls"]
        on_cpu = jax.default_backend() == "cpu" and impls.cpu is not None
        return list((impls.cpu if on_cpu else impls.default)(*args))
    return _compiled(partitioned=None, **params)(*args)


@_operation.def_abstract_eval
def _abstract(*args: Any, results: Any, **_: Any) -> list[Any]:
    mesh = args[0].sharding.mesh
    return [
        args[0].update(
            shape=shape,
            dtype=dtype,
            weak_type=False,
            sharding=NamedSharding(mesh, P(*[None] * len(shape))),
        )
        for shape, dtype in results
    ]


def _lower(
    ctx: Any, *args: Any, impls: Implementations, partitioned: Any, on_cpu: bool, **_: Any
) -> Any:
    for_export = ctx.module_context.lowering_parameters.for_export
    impl = impls.cpu if on_cpu and impls.cpu is not None and not for_export else impls.default
    if partitioned is not None and not for_export:
        impl = jaxpr_as_fun(partitioned)
    return mlir.lower_fun(impl, multiple_results=True)(ctx, *args)


mlir.register_lowering(_operation, functools.partial(_lower, on_cpu=False))
mlir.register_lowering(_operation, functools.partial(_lower, on_cpu=True), platform="cpu")


def _differentiate(
    primals: Sequence[Any],
    tangents: Sequence[Any],
    *,
    impls: Implementations,
    results: Any,
    vjp: VJP | None,
    linear: Linear | None,
    partitioned: Any,
) -> Any:
    full = [_instantiate(tangent, x) for tangent, x in zip(tangents, primals, strict=True)]
    if vjp is not None:
        outputs = _bind(primals, vjp.fwd or impls, results + vjp.residual_types)
        saved = range(len(primals)) if vjp.saved_inputs is None else vjp.saved_inputs
        residuals = [*(primals[i] for i in saved), *outputs[len(results) :]]
        wrt = tuple(i for i, x in enumerate(primals) if jnp.issubdtype(x.dtype, jnp.inexact))
        counts = len(primals), len(residuals)
        jvp = Linearized(impls.differentiable, vjp.restore_inputs, *counts, wrt)
        transposed = dataclasses.replace(jvp, transposed=True)
        linear = Linear(len(residuals), dataclasses.replace(vjp.bwd, reference=transposed))
        args = [*residuals, *(full[i] for i in wrt)]
        return outputs[: len(results)], _bind(args, Implementations(jvp), results, linear=linear)
    outputs = _bind(primals, impls, results, linear=linear)
    return outputs, jax.jvp(as_list(impls.differentiable), tuple(primals), tuple(full))[1]


ad.primitive_jvps[_operation] = _differentiate


def _transpose(
    cotangents: Sequence[Any],
    *args: Any,
    impls: Implementations,
    results: Any,
    linear: Linear | None,
    **_: Any,
) -> list[Any]:
    if linear is None:  # not from a derivative, but of a function that is linear in some arguments
        return _transpose_reference(cotangents, args, impls)
    residuals, linear_args = args[: linear.num_residuals], args[linear.num_residuals :]
    cts = [
        vary_like(jnp.zeros(shape, dtype), *residuals) if type(ct) is ad.Zero else ct
        for ct, (shape, dtype) in zip(cotangents, results, strict=True)
    ]
    unknown = [ad.is_undefined_primal(x) for x in linear_args]
    avals = [x.aval if u else jax.typeof(x) for x, u in zip(linear_args, unknown, strict=True)]
    back = Linear(linear.num_residuals, impls)
    found = _bind([*residuals, *cts], linear.transpose, _types(avals), linear=back)
    # A known linear argument is a zero that JAX has instantiated.
    wanted = [ct if u else None for ct, u in zip(found, unknown, strict=True)]
    return [None] * linear.num_residuals + wanted


def _transpose_reference(
    cotangents: Sequence[Any], args: Sequence[Any], impls: Implementations
) -> list[Any]:
    unknown = [i for i, x in enumerate(args) if ad.is_undefined_primal(x)]

    def function(*values: Any) -> Any:
        given = dict(zip(unknown, values, strict=True))
        return impls.differentiable(*(given.get(i, x) for i, x in enumerate(args)))

    transpose = jax.linear_transpose(as_list(function), *(args[i].aval for i in unknown))
    found = dict(zip(unknown, transpose(list(map(ad.instantiate_zeros, cotangents))), strict=True))
    return [found.get(i) for i in range(len(args))]


ad.primitive_transposes[_operation] = _transpose


def _batch(
    args: Sequence[Any],
    dims: Sequence[int | None],
    *,
    impls: Implementations,
    results: Any,
    vjp: VJP | None,
    linear: Linear | None,
    partitioned: Any,
) -> Any:
    args = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(args, dims, strict=True)]
    axes = tuple(None if d is None else 0 for d in dims)
    (size, *_) = (x.shape[0] for x, axis in zip(args, axes, strict=True) if axis == 0)

    def batched(types: Types) -> Types:
        return tuple(((size, *shape), dtype) for shape, dtype in types)

    def mapped(impls: Implementations, in_axes: Any, out_axes: Any = None) -> Implementations:
        return impls.map(functools.partial(Vmapped, in_axes=in_axes, out_axes=out_axes))

    if vjp is not None:
        saved = axes if vjp.saved_inputs is None else tuple(axes[i] for i in vjp.saved_inputs)
        residuals = (*saved, *[0] * len(vjp.residual_types))
        cotangents = (0,) * len(results)
        restore = vjp.restore_inputs
        vjp = VJP(
            bwd=mapped(vjp.bwd, residuals + cotangents, axes),
            fwd=None if vjp.fwd is None else mapped(vjp.fwd, axes),
            residual_types=batched(vjp.residual_types),
            saved_inputs=vjp.saved_inputs,
            restore_inputs=restore and Vmapped(restore, residuals, axes, summed=False),
        )
    if linear is not None:
        n = linear.num_residuals
        in_axes = axes[:n] + (0,) * len(results)
        linear = Linear(n, mapped(linear.transpose, in_axes, axes[n:]))
    outputs = _bind(args, mapped(impls, axes), batched(results), vjp, linear)
    return outputs, [0] * len(outputs)


batching.primitive_batchers[_operation] = _batch


def _instantiate(tangent: Any, primal: Any) -> Any:
    if type(tangent) is not ad.Zero:
        return tangent
    if not jnp.issubdtype(primal.dtype, jnp.inexact):
        return np.zeros(jnp.shape(primal), jax.dtypes.float0)
    return vary_like(jnp.zeros_like(primal), primal)
