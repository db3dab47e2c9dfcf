"""Operations of a program and the longest chain of dependent ones, counted before XLA.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs, and does not see
into custom calls. Here the jaxpr is walked: loops count as often as they run, and custom calls are
refused, so that nothing is missed.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Literal

_ARITHMETIC = frozenset({
    "add", "add_any", "sub", "mul", "div", "max", "min", "neg", "abs", "sign", "square", "pow",
    "integer_pow", "exp", "exp2", "expm1", "log", "log1p", "sqrt", "rsqrt", "cbrt", "logistic",
    "tanh", "erf", "erf_inv", "sin", "cos",
})  # fmt: skip
_OVER_INPUTS = frozenset({
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin", "cumsum", "cummax",
    "cumlogsumexp",
})  # fmt: skip
_OPAQUE = frozenset({"ffi_call", "pure_callback", "io_callback", "pallas_call"})
_NEVER = -math.inf
"""Depth of a value that does not depend on the inputs in question."""


class Work(NamedTuple):
    """Work of one call of a program."""

    flops: float
    """Additions and multiplications of matmuls, and one for each element of an elementwise
    operation or a reduction."""
    chain: float
    """Length of the longest chain of array operations in which each needs the one before.
    Iterations of a loop are chained only through the carry. Copies, selections and reshapes do not
    count."""


def count_work(function: Callable[..., Any], *arguments: Any) -> Work:
    """`Work` of ``function(*arguments)``; arrays may be given by shape alone.

    Raises:
      ValueError: the program has a custom call, or a loop of unknown length.
    """
    program = jax.make_jaxpr(function)(*arguments).jaxpr
    depths = _depths(program, [0.0] * len(program.invars))
    return Work(_flops(program), max(depths, default=0.0))


def _flops(program: Any) -> float:
    return sum(_flops_of(equation) for equation in program.eqns)


def _flops_of(equation: Any) -> float:
    name = equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * _size(equation.outvars[0]) * math.prod(left[axis] for axis in contracted)
    if name in _ARITHMETIC:
        return float(_size(equation.outvars[0]))
    if name in _OVER_INPUTS:
        return float(_size(equation.invars[0]))
    inner = [_flops(program) for program in _programs(equation)]
    if name == "cond":
        return max(inner)
    return sum(inner) * (equation.params["length"] if name == "scan" else 1)


def _depths(program: Any, inputs: Sequence[float]) -> list[float]:
    """Longest chain up to each output, given those up to each input."""
    known: dict[Any, float] = dict(zip(program.invars, inputs, strict=True))

    def depth(variable: Any) -> float:
        return _NEVER if isinstance(variable, Literal) else known.get(variable, _NEVER)

    for equation in program.eqns:
        before = [depth(variable) for variable in equation.invars]
        for variable, after in zip(equation.outvars, _step(equation, before), strict=True):
            known[variable] = after
    return [depth(variable) for variable in program.outvars]


def _step(equation: Any, before: list[float]) -> list[float]:
    """Depths of the outputs of one operation, from those of its inputs."""
    start = max(before, default=_NEVER)
    inner = _programs(equation)
    if not inner:
        return [start + bool(_flops_of(equation))] * len(equation.outvars)
    if equation.primitive.name == "scan":
        return [start + _loop_chain(equation)] * len(equation.outvars)
    # The predicate of a condition comes first; other calls have the inputs of their program.
    of_branches = [_depths(program, before[-len(program.invars) :]) for program in inner]
    return [max(depths) for depths in zip(*of_branches, strict=True)]


def _loop_chain(equation: Any) -> float:
    body = equation.params["jaxpr"].jaxpr
    # Constants, carry and scanned inputs, in this order; the latter have an axis less in the body.
    # JAX's versions name the number of each differently.
    scanned = sum(
        a.aval.ndim > b.aval.ndim for a, b in zip(equation.invars, body.invars, strict=True)
    )
    outputs = zip(equation.outvars, body.outvars, strict=True)
    carried = sum(a.aval.ndim == b.aval.ndim for a, b in outputs)
    consts = len(body.invars) - carried - scanned
    whole = max(_depths(body, [0.0] * len(body.invars)), default=0.0)
    from_carried = [_NEVER] * len(body.invars)
    from_carried[consts : consts + carried] = [0.0] * carried
    iteration = max(_depths(body, from_carried)[:carried], default=0.0)
    return whole + (equation.params["length"] - 1) * max(iteration, 0.0)


def _programs(equation: Any) -> list[Any]:
    """Jaxprs of an equation: a loop's body, a call, all branches of a condition."""
    name = equation.primitive.name
    if name in _OPAQUE or name == "while":
        raise ValueError(f"the work of {name} cannot be counted; trace a program without it")
    if name in ("custom_jvp_call", "custom_vjp_call"):
        return [_open(equation.params.get("call_jaxpr") or equation.params["fun_jaxpr"])]
    if name == "cond":
        return [_open(branch) for branch in equation.params["branches"]]
    return [_open(equation.params["jaxpr"])] if "jaxpr" in equation.params else []


def _open(program: Any) -> Any:
    return getattr(program, "jaxpr", program)


def _size(variable: Any) -> int:
    return int(np.prod(variable.aval.shape, dtype=np.int64))
