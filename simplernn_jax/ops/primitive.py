"""Operations with fast implementations that JAX cannot transform, such as C functions.

One primitive has a rule for every transformation:

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
class Operation:
    """A function from arrays, the floating ones first, to a list of arrays.

    Its implementations are equal up to rounding.
    """

    default: Implementation
    """Implementation for any platform."""
    cpu: Implementation | None = None
    """Faster implementation for CPUs, if any."""
    reference: Implementation | None = None
    """Implementation that JAX differentiates; None if it can differentiate `default`."""
    fwd: "Operation | None" = None
    """``fwd(*inputs)``: outputs and residuals for `bwd`; None if there are no residuals."""
    bwd: "Operation | None" = None
    """``bwd(*inputs, *residuals, *cotangents)``: the cotangents of the floating inputs. None
    differentiates the reference."""
    partitioned: Implementation | None = None
    """Implementation in `custom_partitioning`; None leaves sharded operands to XLA."""
    cpu_supports_vmap: bool = True
    """True if `vmap` may map `cpu`; otherwise it maps `differentiable` on CPUs."""
    num_residuals: int = 0
    transpose: "Operation | None" = None
    """Of a derivative, which is linear in the arguments after the first `num_residuals`: (these,
    cotangents of the outputs) to the cotangents of the linear arguments."""

    def __call__(self, *inputs: jax.Array) -> list[jax.Array]:
        """Compute the outputs."""
        inputs = tuple(vary_like(x, *inputs) for x in inputs)  # one type inside `shard_map`
        return _bind(self, inputs, _result_types(self, inputs))

    @property
    def differentiable(self) -> Implementation:
        """Implementation that JAX differentiates, to any order."""
        return self.reference or self.default

    def map(
        self, in_axes: tuple[int | None, ...], out_axes: tuple[int | None, ...] = ()
    ) -> "Operation":
        """Map the operation for `vmap`, as `Vmapped`; XLA partitions the result."""

        def mapped(impl: Implementation | None) -> Any:
            return impl and Vmapped(impl, in_axes, out_axes)

        n = self.num_residuals
        return Operation(
            mapped(self.default),
            mapped(self.cpu if self.cpu_supports_vmap else self.cpu and self.differentiable),
            mapped(self.reference),
            fwd=self.fwd and self.fwd.map(in_axes),
            bwd=self.bwd and self.bwd.map(in_axes, in_axes),
            num_residuals=n,
            transpose=self.transpose and self.transpose.map(in_axes[:n], in_axes[n:]),
        )


@dataclasses.dataclass(frozen=True)
class Vmapped:
    """An implementation mapped over a leading axis.

    Arguments after `in_axes` have it. Results whose entry of `out_axes` is None are summed over it.
    """

    impl: Implementation
    in_axes: tuple[int | None, ...]
    out_axes: tuple[int | None, ...]

    def __call__(self, *args: jax.Array) -> Sequence[jax.Array]:
        """Compute the mapped implementation."""
        in_axes = self.in_axes + (0,) * (len(args) - len(self.in_axes))
        outputs = list(jax.vmap(as_list(self.impl), in_axes)(*args))
        for i, axis in enumerate(self.out_axes[: len(outputs)]):
            if axis is None:
                outputs[i] = jnp.sum(outputs[i], 0)
        return outputs


@dataclasses.dataclass(frozen=True)
class Linearized:
    """(Inputs, residuals, tangents of the floating inputs) to the tangents of the outputs."""

    impl: Implementation
    num_inputs: int
    num_residuals: int
    num_floating: int

    def __call__(self, *args: jax.Array) -> Sequence[jax.Array]:
        """Compute the derivative."""
        inputs, tangents = args[: self.num_inputs], args[self.num_residuals :]
        floating, others = inputs[: self.num_floating], inputs[self.num_floating :]

        def function(*floating: jax.Array) -> Sequence[jax.Array]:
            return list(self.impl(*floating, *others))

        return jax.jvp(function, floating, tangents)[1]


def as_list(impl: Implementation) -> Implementation:
    """Wrap `impl` to return a list, as JAX's transformations need one type of sequence."""
    return lambda *args: list(impl(*args))


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


def _bind(op: Operation, args: Sequence[Any], results: Types) -> list[Any]:
    for x in args:
        spec = jax.typeof(x).sharding.spec
        if any(axis is not None for axis in spec):
            raise ValueError(
                f"an array of shape {x.shape} is sharded as {spec} over explicit axes, which have "
                "no rules here; create the mesh with axis_types=(jax.sharding.AxisType.Auto, ...)"
            )
    partitioned = None
    if op.partitioned is not None and not on_one_device():
        partitioned = _partitioned_jaxpr(op, _types(args), jax.config.jax_enable_x64)  # type: ignore[attr-defined, unused-ignore]
    return _operation.bind(*args, op=op, results=results, partitioned=partitioned)


def _types(arrays: Sequence[Any]) -> Types:
    return tuple((x.shape, np.dtype(x.dtype)) for x in arrays)


def _result_types(op: Operation, args: Sequence[Any]) -> Types:
    return _cached_result_types(op, _types(args), jax.config.jax_enable_x64)  # type: ignore[attr-defined, unused-ignore]


@functools.lru_cache(maxsize=1024)
def _cached_result_types(op: Operation, types: Types, x64: bool) -> Types:
    del x64  # a key of the cache
    return _types(
        jax.eval_shape(op.differentiable, *(jax.ShapeDtypeStruct(*each) for each in types))
    )


@functools.lru_cache(maxsize=256)
def _partitioned_jaxpr(op: Operation, types: Types, x64: bool) -> Any:
    """Trace the partitioned implementation.

    The jaxpr is a parameter of the primitive, where `jit` finds `custom_partitioning`: it then
    lowers with the devices, which `custom_partitioning` needs.
    """
    del x64  # a key of the cache
    assert op.partitioned is not None
    return jax.make_jaxpr(op.partitioned)(*(jax.ShapeDtypeStruct(*each) for each in types))


@functools.lru_cache(maxsize=1024)
def _compiled(**params: Any) -> Callable[..., Any]:
    return jax.jit(functools.partial(_operation.bind, **params))


@_operation.def_impl
def _impl(*args: jax.Array, **params: Any) -> Any:
    with jax.disable_jit(False):
        return _compiled(**params)(*args)


@_operation.def_abstract_eval
def _abstract(*args: Any, results: Types, **_: Any) -> list[Any]:
    mesh = args[0].sharding.mesh

    def aval(shape: Any, dtype: Any) -> Any:
        sharding = NamedSharding(mesh, P(*[None] * len(shape)))
        return args[0].update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)

    return [aval(*each) for each in results]


def _lower(ctx: Any, *args: Any, op: Operation, partitioned: Any, on_cpu: bool, **_: Any) -> Any:
    for_export = ctx.module_context.lowering_parameters.for_export
    impl = op.cpu if on_cpu and op.cpu is not None and not for_export else op.default
    if partitioned is not None and not for_export:
        impl = jaxpr_as_fun(partitioned)
    return mlir.lower_fun(impl, multiple_results=True)(ctx, *args)


mlir.register_lowering(_operation, functools.partial(_lower, on_cpu=False))
mlir.register_lowering(_operation, functools.partial(_lower, on_cpu=True), platform="cpu")


def _differentiate(
    primals: Sequence[Any], tangents: Sequence[Any], *, op: Operation, results: Types, **_: Any
) -> Any:
    tangents = [_instantiate(tangent, x) for tangent, x in zip(tangents, primals, strict=True)]
    if op.bwd is None:
        outputs = _bind(op, primals, results)
        return outputs, jax.jvp(as_list(op.differentiable), tuple(primals), tuple(tangents))[1]
    fwd, fwd_results = (op, results) if op.fwd is None else (op.fwd, _result_types(op.fwd, primals))
    outputs = _bind(fwd, primals, fwd_results)
    residuals, outputs = [*primals, *outputs[len(results) :]], outputs[: len(results)]
    floating = sum(jnp.issubdtype(x.dtype, jnp.inexact) for x in primals)
    linear = Operation(
        Linearized(op.differentiable, len(primals), len(residuals), floating),
        num_residuals=len(residuals),
        transpose=op.bwd,
    )
    return outputs, _bind(linear, [*residuals, *tangents[:floating]], results)


ad.primitive_jvps[_operation] = _differentiate


def _transpose(
    cotangents: Sequence[Any], *args: Any, op: Operation, results: Types, **_: Any
) -> list[Any]:
    if op.transpose is None:
        raise NotImplementedError("only derivatives of this operation can be transposed")
    n = op.num_residuals
    residuals, linear_args = args[:n], args[n:]
    cts = [
        vary_like(jnp.zeros(shape, dtype), *residuals) if type(ct) is ad.Zero else ct
        for ct, (shape, dtype) in zip(cotangents, results, strict=True)
    ]
    unknown = [ad.is_undefined_primal(x) for x in linear_args]
    avals = [x.aval if u else jax.typeof(x) for x, u in zip(linear_args, unknown, strict=True)]
    back = dataclasses.replace(op.transpose, num_residuals=n, transpose=op)
    found = _bind(back, [*residuals, *cts], _types(avals))
    # A known linear argument is a zero that JAX has instantiated.
    wanted = [ct if u else None for ct, u in zip(found, unknown, strict=True)]
    return [None] * n + wanted


ad.primitive_transposes[_operation] = _transpose


def _batch(
    args: Sequence[Any], dims: Sequence[int | None], *, op: Operation, results: Types, **_: Any
) -> Any:
    args = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(args, dims, strict=True)]
    axes = tuple(None if d is None else 0 for d in dims)
    size = next(x.shape[0] for x, axis in zip(args, axes, strict=True) if axis == 0)
    outputs = _bind(op.map(axes), args, tuple(((size, *shape), dtype) for shape, dtype in results))
    return outputs, [0] * len(outputs)


batching.primitive_batchers[_operation] = _batch


def _instantiate(tangent: Any, primal: Any) -> Any:
    if type(tangent) is not ad.Zero:
        return tangent
    if not jnp.issubdtype(primal.dtype, jnp.inexact):
        return np.zeros(jnp.shape(primal), jax.dtypes.float0)
    return vary_like(jnp.zeros_like(primal), primal)
