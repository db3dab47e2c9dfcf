"""Operations of a program and the critical path, counted before XLA.

XLA's own `cost_analysis` counts the body of a loop once and does not see into C functions. Here
loops count as often as they run, this package's operations count in the form for any platform, and
other custom calls are rejected.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal

from simplernn_jax.ops.primitive import as_list

_ARITHMETIC = frozenset({
    "add", "add_any", "sub", "mul", "div", "max", "min", "neg", "abs", "sign", "square", "pow",
    "integer_pow", "exp", "exp2", "expm1", "log", "log1p", "sqrt", "rsqrt", "cbrt", "logistic",
    "tanh", "erf", "erf_inv", "sin", "cos",
})  # fmt: skip
_OVER_INPUTS = frozenset({
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin", "cumsum", "cummax",
    "cumlogsumexp",
})  # fmt: skip
_OPAQUE = frozenset({"ffi_call", "pure_callback", "io_callback", "pallas_call", "while"})
_NEVER = -math.inf
"""Depth of a value that does not depend on the inputs in question."""


class Work(NamedTuple):
    """Work of one call of a program; copies, selections and reshapes do not count."""

    flops: float
    """Additions and multiplications of matmuls, and one for each element of an elementwise
    operation or a reduction."""
    chain: float
    """Length of the critical path, the longest chain of dependent array operations; iterations of
    a loop are chained only through the carry."""


def count_work(function: Callable[..., Any], *arguments: Any) -> Work:
    """`Work` of ``function(*arguments)``; arrays may be given by shape alone.

    Raises:
      ValueError: the program has a custom call, or a loop of unknown length.
    """
    program = jax.make_jaxpr(function)(*arguments).jaxpr
    flops, depths = _walk(program, [0.0] * len(program.invars))
    return Work(flops, max(depths, default=0.0))


def _walk(program: Any, inputs: Sequence[float]) -> tuple[float, list[float]]:
    """Operations, and the critical path up to each output from those up to each input."""
    known: dict[Any, float] = dict(zip(program.invars, inputs, strict=True))

    def depth(variable: Any) -> float:
        return _NEVER if isinstance(variable, Literal) else known.get(variable, _NEVER)

    total = 0.0
    for equation in program.eqns:
        flops, after = _count(equation, [depth(variable) for variable in equation.invars])
        total += flops
        known.update(zip(equation.outvars, after, strict=True))
    return total, [depth(variable) for variable in program.outvars]


def _count(equation: Any, before: list[float]) -> tuple[float, list[float]]:
    """Operations of an equation, and the chains up to its outputs."""
    name, start = equation.primitive.name, max(before, default=_NEVER)
    inner = _programs(equation)
    if name == "scan":
        flops, chain = _count_loop(equation, *inner)
        return flops, [start + chain] * len(equation.outvars)
    if inner:
        # The predicate of a condition comes first; other calls have the inputs of their program.
        found = [_walk(program, before[-len(program.invars) :]) for program in inner]
        depths = zip(*(depths for _, depths in found), strict=True)
        return max(flops for flops, _ in found), [max(each) for each in depths]
    flops = 0.0
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        flops = 2.0 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
    elif name in _ARITHMETIC or name in _OVER_INPUTS:
        counted = equation.outvars if name in _ARITHMETIC else equation.invars
        flops = float(counted[0].aval.size)
    return flops, [start + bool(flops)] * len(equation.outvars)


def _count_loop(equation: Any, body: Any) -> Work:
    # Constants, carry and scanned inputs, in this order; the latter have an axis less in the body.
    # JAX's versions name the number of each differently.
    inputs = zip(equation.invars, body.invars, strict=True)
    outputs = zip(equation.outvars, body.outvars, strict=True)
    scanned = sum(a.aval.ndim > b.aval.ndim for a, b in inputs)
    carried = sum(a.aval.ndim == b.aval.ndim for a, b in outputs)
    consts = len(body.invars) - carried - scanned
    flops, depths = _walk(body, [0.0] * len(body.invars))
    _, from_carry = _walk(body, [_NEVER] * consts + [0.0] * carried + [_NEVER] * scanned)
    length = equation.params["length"]
    repeated = (length - 1) * max([0.0, *from_carry[:carried]])
    return Work(flops * length, max(depths, default=0.0) + repeated)


def _programs(equation: Any) -> list[Any]:
    """Jaxprs of an equation: a loop's body, a call, all branches of a condition."""
    name, params = equation.primitive.name, equation.params
    if name in _OPAQUE:
        raise ValueError(f"the work of {name} cannot be counted; trace a program without it")
    if "op" in params:  # the primitive of `simplernn_jax.ops.primitive`
        shapes = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in equation.invars]
        return [jax.make_jaxpr(as_list(params["op"].default))(*shapes).jaxpr]
    programs = params.get("branches") or [
        params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params
    ]
    return [getattr(program, "jaxpr", program) for program in programs]
