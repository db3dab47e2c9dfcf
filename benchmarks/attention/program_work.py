"""Operations of a program, counted before XLA.

XLA's own `cost_analysis` counts the body of a loop once and does not see into C functions. Here
loops count as often as they run, this package's operations count in the form for any platform, and
other custom calls are rejected.
"""

import math
from collections.abc import Callable
from typing import Any

import jax

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


def count_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Operations of ``function(*arguments)``; arrays may be given by shape alone.

    They are the additions and multiplications of matmuls, and one for each element of an
    elementwise operation or a reduction. Copies, selections and reshapes do not count. Of the
    branches of a condition, the one with the most counts.

    Raises:
      ValueError: the program has a custom call, or a loop of unknown length.
    """
    return _count_program(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count_program(program: Any) -> float:
    return sum(_count(equation) for equation in program.eqns)


def _count(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name in _OPAQUE:
        raise ValueError(f"the work of {name} cannot be counted; trace a program without it")
    if "op" in params:  # the primitive of `simplernn_jax.ops.primitive`
        shapes = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in equation.invars]
        return count_flops(as_list(params["op"].default), *shapes)
    programs = params.get("branches") or [
        params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params
    ]
    if programs:
        inner = max(_count_program(getattr(program, "jaxpr", program)) for program in programs)
        return inner * (params["length"] if name == "scan" else 1)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
    if name in _ARITHMETIC or name in _OVER_INPUTS:
        counted = equation.outvars if name in _ARITHMETIC else equation.invars
        return float(counted[0].aval.size)
    return 0.0
