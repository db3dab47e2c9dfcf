"""Calls of the C functions with arguments that may be wrong, for test_native.py.

    python wrong_calls.py NUMBER

Prints how many of them were rejected. It runs in a process of its own, since what it looks for ends
the process.
"""

import faulthandler
import functools
import random
import sys

import jax
import jax.numpy as jnp
import numpy as np

from simplernn_jax.ops import native

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint8", "bool", "complex64")
SIZES = {"B": 2, "T": 3, "H": 2, "K": 4, "V": 5, "S": 7, "D": 6, "W": 3, "P": 2}


def decode_signature(dtype, values_per_word=1):
    """Signature for two layers, M = 64 and a vocabulary of S."""

    def matrix(leading, inputs):
        return [f"{leading} 1 {-(-inputs // values_per_word)} 64 {dtype}", f"{leading} 1 1 64"]

    size = SIZES["D"]
    weights = [
        *(matrix("", size) + matrix("2", size) + matrix("2", 2 * SIZES["V"])),
        *(matrix("2", size) + matrix("2", 64) + matrix("", size)),
        *("2 4 D", "2 64", "D", "S"),
    ]
    states = ["P H K V", "P 3 D"] * 2
    slots = f"B {SIZES['T'] + 1} int32"
    arguments = ["B T int32", "B int32", "P S", *weights, slots, *states]
    return arguments, ["P S", "B T D", f"B {154 * SIZES['T']}", *states]


QKV = ["B T H K", "B T H K", "B T H V", "B T H K", "B H K V"]
NATIVE = {
    "simplernn_forward": ([*QKV, "B T bool"], ["B T H V", "B H K V"]),
    "simplernn_backward": ([*QKV, "B T bool", "B T H V", "B H K V"], QKV),
    "simplernn_convolution_forward": (
        ["B T D", "W D", "B P D", "B T bool"],
        ["B T D", "B T", "B P D"],
    ),
    "simplernn_convolution_backward": (
        ["B T D", "W D", "B P D", "B T bool", "B T", "B T D", "B P D"],
        ["B T D", "B H W D", "B P D"],
    ),
    "simplernn_norm_forward": (["B T D"], ["B T D", "B T"]),
    "simplernn_norm_backward": (["B T D", "B T", "B T D"], ["B T D"]),
    "simplernn_newton_schulz": (["B T D", "H K", "W D"], ["B T D", "H K", "W D"]),
    "simplernn_decode": decode_signature("float32"),
    "simplernn_decode of bfloat16": decode_signature("bfloat16"),
    "simplernn_decode of int8": decode_signature("int32", 4),
    "simplernn_decode of int4": decode_signature("uint32", 8),
}
"""Axes of the arguments and results of the C functions, with a dtype that is not float32."""


@functools.cache
def array(shape, dtype):
    rng = np.random.default_rng(0)
    return jax.device_put(rng.integers(0, 2, shape).astype(jnp.dtype(dtype)))


def wrong_shape(draw, right):
    """A shape with an axis more, less, longer, shorter, empty or elsewhere."""
    kind = draw.choice(["longer", "shorter", "dropped", "added", "one", "zero", "moved"])
    if kind == "added" or not right:
        return (*right[: (place := draw.randint(0, len(right)))], 1 + place, *right[place:])
    place = draw.randrange(len(right))
    if kind == "dropped":
        return (*right[:place], *right[place + 1 :])
    if kind == "moved":
        return (*right[place:], *right[:place])
    size = {"longer": right[place] + 1, "shorter": max(right[place] - 1, 0), "one": 1, "zero": 0}
    return (*right[:place], size[kind], *right[place + 1 :])


def draw_buffers(draw, signature):
    """``(shape, dtype)`` of each array, mostly with one thing that is wrong: the more there are,
    the sooner a check finds one."""
    sizes = dict(SIZES)
    if draw.random() < 0.25:
        sizes[draw.choice("BTHKVDP")] = 0
    found = []
    for text in signature:
        axes = [axis for axis in text.split() if axis in sizes or axis.isdecimal()]
        dtypes = [word for word in text.split() if word in DTYPES or word == "uint32"]
        shape = tuple(sizes[axis] if axis in sizes else int(axis) for axis in axes)
        found.append((shape, dtypes[0] if dtypes else "float32"))
    for _ in range(draw.choice([0, 1, 1, 1, 1, 2])):
        place = draw.randrange(len(found))
        shape, dtype = found[place]
        if draw.random() < 0.25:
            found[place] = shape, draw.choice(DTYPES)
        else:
            found[place] = wrong_shape(draw, shape), dtype
    return found


def draw_call(draw):
    kind = draw.choice(sorted(NATIVE))
    arguments, results = NATIVE[kind]
    found = draw_buffers(draw, arguments + results)
    given, wanted = found[: len(arguments)], found[len(arguments) :]
    if draw.random() < 0.05:
        given = draw.choice([given[:-1], [*given, given[0]], given[:1]])
    if draw.random() < 0.05:
        wanted = draw.choice([wanted[:-1] or wanted * 2, [*wanted, wanted[0]]])
    return kind.split()[0], given, wanted


def is_rejected(name, given, wanted):
    """Call a function; whether it raises an error that names it."""
    results = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in wanted]
    try:
        made = jax.ffi.ffi_call(name, results)(*(array(*buffer) for buffer in given))
        jax.block_until_ready(made)
    except jax.errors.JaxRuntimeError as error:
        if name not in str(error):
            raise
        return True
    return False


if __name__ == "__main__":
    faulthandler.enable()
    assert native.has_native_functions()
    draw = random.Random(0)
    print(sum(is_rejected(*draw_call(draw)) for _ in range(int(sys.argv[1]))))
