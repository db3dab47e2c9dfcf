"""Calls of every public function with arguments that may be wrong, for test_argument_safety.py.

    python wrong_calls.py operators|models|native NUMBER

Prints how many calls it made, and how many of them were refused. It runs in a process of its own,
since what it looks for ends the process.
"""

import dataclasses
import faulthandler
import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import strategies as st

from simplernn_jax.config import ModelConfig
from simplernn_jax.models import Attention, LanguageModel, SimpleRNN, SimpleRNNCell
from simplernn_jax.models.blocks import PlainBlock, ResidualBlock
from simplernn_jax.models.convolution import ShortConvolution
from simplernn_jax.models.layer_stack import LayerStack
from simplernn_jax.models.layers import Dense
from simplernn_jax.ops import gated_linear_recurrence, native, recurrent_step
from simplernn_jax.ops.attention import apply_rope, attend, sliding_attention
from simplernn_jax.ops.convolution import rms_norm_convolution
from simplernn_jax.ops.matmul import fused_matmul
from simplernn_jax.ops.rms_norm import rms_norm
from simplernn_jax.ops.segments import reset_state, segment_starts

FLOATING = ("float32", "bfloat16", "float16")
INTEGER = ("int32", "uint8")
DTYPES = (*FLOATING, *INTEGER, "bool", "complex64")
SIZES = {"B": 2, "T": 3, "H": 2, "K": 4, "V": 5, "S": 7, "D": 6, "W": 3, "P": 2, "N": 5, "O": 3}
NOT_ARRAYS = ("text", 7, [1.0, 2.0], 1j)


@dataclasses.dataclass(frozen=True)
class Spec:
    """An argument: its axes as in `simplernn_jax.ops.checks`, and its dtypes, the usual first."""

    axes: str
    dtypes: tuple[str, ...] = FLOATING
    optional: bool = False

    def shape(self, sizes):
        return tuple(sizes[axis.rstrip("?")] for axis in self.axes.split() if axis != "...")

    def accepts(self, x, sizes):
        """Return whether `x` is one of these; sizes that were not known are entered."""
        if x is None:
            return self.optional
        if not isinstance(x, jax.Array) or str(x.dtype) not in self.dtypes:
            return False
        axes = self.axes.split()
        shape = x.shape
        if axes[:1] == ["..."]:
            axes = axes[1:]
            shape = shape[len(shape) - len(axes) :] if len(shape) >= len(axes) else (None,)
        if len(shape) != len(axes):
            return False
        for axis, size in zip(axes, shape, strict=True):
            if axis.endswith("?"):
                if size not in (1, sizes.setdefault(axis[:-1], size)):
                    return False
            elif size != sizes.setdefault(axis, size):
                return False
        return True


class Rows(Spec):
    """Any array whose first axis is B."""

    def accepts(self, x, sizes):
        """Return whether `x` is one."""
        return (
            isinstance(x, jax.Array)
            and x.ndim > 0
            and x.shape[0] == sizes.setdefault("B", x.shape[0])
        )


@dataclasses.dataclass(frozen=True)
class State:
    """A state as `make` makes it for a batch size."""

    make: Callable[[int], Any]

    def accepts(self, x, sizes):
        if x is None:
            return True
        x = tuple(x) if isinstance(x, list) else x  # the states of layers may be in a list
        right = jax.eval_shape(lambda: self.make(sizes["B"]))
        return jax.tree.map(jnp.shape, x) == jax.tree.map(jnp.shape, right)


@dataclasses.dataclass(frozen=True)
class Site:
    """A function, its arguments, and the sizes that it knows itself."""

    call: Callable[..., Any]
    arguments: tuple[Spec | State, ...]
    known: dict[str, int] = dataclasses.field(default_factory=dict)

    def accepts(self, values):
        """Return whether these are arguments as the function wants them."""
        pairs = list(zip(self.arguments, values, strict=True))
        pairs.sort(key=lambda pair: isinstance(pair[0], State))  # sizes of arrays come first
        sizes = dict(self.known)
        return all(spec.accepts(value, sizes) for spec, value in pairs)

    def is_usual(self, values):
        """Return whether all arrays have the dtypes that users have most."""
        return all(
            value is None or str(value.dtype) == spec.dtypes[0]
            for spec, value in zip(self.arguments, values, strict=True)
            if isinstance(spec, Spec)
        )


@functools.cache
def array(shape, dtype):
    rng = np.random.default_rng(0)
    return jax.device_put(rng.integers(0, 2, shape).astype(jnp.dtype(dtype)))


def usually(value, *others):
    """`value` three times out of four."""
    if not others:
        return st.just(value)
    return st.integers(0, 3).flatmap(
        lambda index: st.sampled_from(others) if index == 0 else st.just(value)
    )


@st.composite
def shapes(draw, right):
    """The right shape, or one with an axis more, less, longer, shorter, empty or elsewhere."""
    kind = draw(usually("right", "longer", "shorter", "dropped", "added", "one", "zero", "moved"))
    if kind == "added" or (kind != "right" and not right):
        return (*right[: (place := draw(st.integers(0, len(right))))], 1 + place, *right[place:])
    if kind == "right":
        return right
    place = draw(st.integers(0, len(right) - 1))
    if kind == "dropped":
        return (*right[:place], *right[place + 1 :])
    if kind == "moved":
        return (*right[place:], *right[:place])
    size = {"longer": right[place] + 1, "shorter": max(right[place] - 1, 0), "one": 1, "zero": 0}
    return (*right[:place], size[kind], *right[place + 1 :])


@st.composite
def arrays(draw, spec, sizes):
    if draw(st.integers(0, 40)) == 0:
        return draw(st.sampled_from(NOT_ARRAYS))
    if spec.optional and draw(st.booleans()):
        return None
    dtype = draw(usually(spec.dtypes[0], *DTYPES))
    return array(draw(shapes(spec.shape(sizes))), dtype)


@st.composite
def states(draw, spec, sizes):
    kind = draw(usually("right", "none", "batch", "leaf", "part", "other", "dict"))
    if kind == "none":
        return None
    batch = sizes["B"] + (kind == "batch") * draw(st.sampled_from([-1, 1, 5]))
    state = jax.tree.map(jax.device_put, spec.make(max(batch, 0)))
    leaves, tree = jax.tree.flatten(state)
    if kind == "leaf":
        place = draw(st.integers(0, len(leaves) - 1))
        leaf = leaves[place]
        dtype = draw(usually(str(leaf.dtype), *DTYPES))
        leaves[place] = array(draw(shapes(leaf.shape)), dtype)
        return jax.tree.unflatten(tree, leaves)
    if kind == "part":
        return leaves if len(leaves) > 1 else leaves[0][..., 0]
    if kind == "other":
        return draw(st.sampled_from(NOT_ARRAYS))
    return {"state": state} if kind == "dict" else state


@st.composite
def calls(draw, sites):
    """A site and arguments for it; all of them agree on sizes, before some are made wrong."""
    name = draw(st.sampled_from(sorted(sites)))
    site = sites[name]
    sizes = {**SIZES, **site.known}
    if draw(st.integers(0, 7)) == 0:
        sizes[draw(st.sampled_from(["B", "T", "B", "T", "H", "K", "V", "N"]))] = 0
        sizes |= site.known
    values = [
        draw((states if isinstance(spec, State) else arrays)(spec, sizes))
        for spec in site.arguments
    ]
    return name, values


def operators() -> dict[str, Site]:
    """Every public function of `simplernn_jax.ops`."""
    q, v, state = Spec("B T H K"), Spec("B T H V"), Spec("B H K V", optional=True)
    ids = Spec("B T", INTEGER, optional=True)
    starts = Spec("B T", ("bool",), optional=True)
    reach = Spec("B? T", INTEGER)

    def recurrence(**options):
        def call(q, k, v, log_gate, state, ids):
            return gated_linear_recurrence(
                q, k, v, log_gate, initial_state=state, segment_ids=ids, **options
            )

        return Site(call, (q, q, v, q, state, ids))

    def convolution(**options):
        call = functools.partial(rms_norm_convolution, **options)
        return Site(call, (Spec("B T D"), Spec("W D"), Spec("B P D"), starts))

    step = (Spec("B H K"), Spec("B H K"), Spec("B H V"), Spec("B H K"), Spec("B H K V"))
    keys, values = Spec("B S H K"), Spec("B S H V")
    matrix = Spec("D O")
    return {
        "recurrence": recurrence(),
        "recurrence in chunks": recurrence(chunk_size=8),
        "recurrence by definition": recurrence(method="scan"),
        "recurrence in bfloat16": recurrence(state_dtype=jnp.bfloat16),
        "recurrence in integers": recurrence(state_dtype=jnp.int8),
        "step": Site(recurrent_step, step),
        "segment starts": Site(segment_starts, (Spec("B T", INTEGER),)),
        "clear rows": Site(reset_state, (Rows("B K V", DTYPES), Spec("B", ("bool",)))),
        "norm": Site(rms_norm, (Spec("... D"),)),
        "norm in C": Site(functools.partial(rms_norm, native=True), (Spec("... D"),)),
        "convolution": convolution(),
        "convolution in C": convolution(native=True),
        "product": Site(lambda x, y: fused_matmul(x, (y,), jnp.float32), (Spec("... D"), matrix)),
        "products": Site(
            lambda x, y, z: fused_matmul(x, (y, z), jnp.bfloat16),
            (Spec("... D"), matrix, Spec("D V")),
        ),
        "product in integers": Site(
            lambda x, y: fused_matmul(x, (y,), jnp.int32), (Spec("... D"), matrix)
        ),
        "apply_rope": Site(apply_rope, (q, reach)),
        "attend": Site(attend, (q, keys, values, Spec("B? T S", ("bool",)))),
        "sliding attention": Site(lambda *x: sliding_attention(*x, 4), (q, keys, values, reach)),
    }


def models() -> dict[str, Site]:
    """Every module of `simplernn_jax.models`."""
    rngs = nnx.Rngs(0)
    sizes = {"hidden_dim": 6, "key_dim": 8, "value_dim": 10, "output_dim": 3, "num_heads": 2}
    config = ModelConfig(
        vocab_size=5, num_layers=2, hidden_dim=6, key_dim=8, value_dim=10, num_heads=2, mlp_dim=7,
        mixer="simple_rnn,attention", mixer_options={"context": 4},
    )  # fmt: skip
    alike = dataclasses.replace(config, mixer="simple_rnn")
    plain = dataclasses.replace(alike, block="plain")
    known = {"D": 6, "H": 2, "K": 4, "V": 5}
    x, ids = Spec("B T D"), Spec("B T", INTEGER, optional=True)
    tokens = Spec("B T", INTEGER)
    cell = SimpleRNNCell(**sizes, rngs=rngs)
    gated = SimpleRNNCell(**sizes, output_gate=True, output_norm=True, rngs=rngs)
    stacked = LanguageModel(alike, rngs=rngs, stack_layers=True)

    def over_time(layer):
        return Site(layer, (x, State(layer.initial_state), ids), known)

    def language_model(config):
        model = LanguageModel(config, rngs=rngs)
        return Site(model, (tokens, State(model.initial_state), ids), known)

    model = LanguageModel(config, rngs=rngs)
    return {
        "cell": Site(cell, (Spec("B H K V"), Spec("B D")), known),
        "project": Site(cell.project, (Spec("... D"),), known),
        "project_outputs": Site(
            gated.project_outputs, (Spec("B T H V"), Spec("B T O")), {**known, "O": 10}
        ),
        "layer": over_time(SimpleRNN(**sizes, rngs=rngs)),
        "layer in bfloat16": over_time(SimpleRNN(**sizes, state_dtype=jnp.bfloat16, rngs=rngs)),
        "attention": over_time(Attention(**sizes, context=4, rngs=rngs)),
        "short convolution": over_time(ShortConvolution(3, 6, rngs=rngs, normalize=True)),
        "dense": Site(Dense(6, 3, ("embed", "mlp"), rngs=rngs), (Spec("N D"),), known),
        "plain block": over_time(PlainBlock(plain, "simple_rnn", rngs=rngs)),
        "block": over_time(ResidualBlock(config, "simple_rnn", rngs=rngs)),
        "block of attention": over_time(ResidualBlock(config, "attention", rngs=rngs)),
        "stack": over_time(LayerStack(LanguageModel(alike, rngs=rngs).layers)),
        "model": language_model(config),
        "plain model": language_model(plain),
        "model of stages": Site(stacked, (tokens, State(stacked.initial_state), ids), known),
        "logits": Site(model.logits, (Spec("... D"),), known),
    }


def run_calls(kind: str, number: int) -> dict[str, int]:
    """Every call raises ValueError or TypeError, or all its arguments are right.

    Right calls of operators are executed with the usual dtypes, others only traced: compiling would
    take most of the time.
    """
    sites = operators() if kind == "operators" else models()
    counts = {"calls": 0, "refused": 0}

    @settings(number)
    @hypothesis.given(calls(sites))
    def run(call):
        name, values = call
        site = sites[name]
        counts["calls"] += 1
        is_right = site.accepts(values)
        try:
            if is_right and not (kind == "operators" and site.is_usual(values)):
                jax.eval_shape(lambda: site.call(*values))
            else:
                jax.block_until_ready(site.call(*values))
        except (ValueError, TypeError):
            counts["refused"] += 1
        except jax.errors.JaxRuntimeError:
            assert "in C" in name  # asked for, they are called whatever the dtype is
            counts["refused"] += 1
        else:
            assert is_right, "was accepted"

    run()
    return counts


def settings(number):
    return hypothesis.settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def decode_signature(dtype, together=1):
    """Signature for two layers, M = 64 and a vocabulary of S; `together` inputs share a word."""

    def matrix(leading, inputs):
        return [f"{leading} 1 {-(-inputs // together)} 64 {dtype}", f"{leading} 1 1 64"]

    size = SIZES["D"]
    weights = [
        *(matrix("", size) + matrix("2", size) + matrix("2", 2 * SIZES["V"])),
        *(matrix("2", size) + matrix("2", 64) + matrix("", size)),
        *("2 4 D", "2 64", "D", "S"),
    ]
    states = ["B H K V", "B 3 D"] * 2
    arguments = ["B T int32", "B int32", "B S", *weights, *states]
    return arguments, ["B S", "B T D", f"B {152 * SIZES['T']}", *states]


NATIVE = {
    native.RECURRENCE_FORWARD: (
        ["B T H K", "B T H K", "B T H V", "B T H K", "B H K V", "B T bool"],
        ["B T H V", "B H K V"],
    ),
    native.RECURRENCE_BACKWARD: (
        ["B T H K", "B T H K", "B T H V", "B T H K", "B H K V", "B T bool", "B T H V", "B H K V"],
        ["B T H K", "B T H K", "B T H V", "B T H K", "B H K V"],
    ),
    native.CONVOLUTION_FORWARD: (["B T D", "W D", "B P D", "B T bool"], ["B T D", "B T", "B P D"]),
    native.CONVOLUTION_BACKWARD: (
        ["B T D", "W D", "B P D", "B T bool", "B T", "B T D", "B P D"],
        ["B T D", "B H W D", "B P D"],
    ),
    native.NORM_FORWARD: (["B T D"], ["B T D", "B T"]),
    native.NORM_BACKWARD: (["B T D", "B T", "B T D"], ["B T D"]),
    native.NEWTON_SCHULZ: (["B T D", "H K", "W D"], ["B T D", "H K", "W D"]),
    native.DECODE: decode_signature("float32"),
    f"{native.DECODE} of bfloat16": decode_signature("bfloat16"),
    f"{native.DECODE} of int8": decode_signature("int32", 4),
    f"{native.DECODE} of int4": decode_signature("uint32", 8),
}
"""Arguments and results of the C functions: axes, and the dtype where it is not float32."""


@st.composite
def native_calls(draw):
    """Mostly one thing that is wrong: the more there are, the sooner a check finds one."""
    kind = draw(st.sampled_from(sorted(NATIVE)))
    name = kind.split()[0]
    arguments, results = ([text.split() for text in side] for side in NATIVE[kind])
    sizes = dict(SIZES)
    if draw(st.integers(0, 3)) == 0:
        sizes[draw(st.sampled_from("BTHKVDP"))] = 0
    buffers = []
    for text in arguments + results:
        axes = [axis for axis in text if axis in sizes or axis.isdecimal()]
        dtype = "float32" if len(axes) == len(text) else text[-1]
        buffers.append((tuple(sizes[x] if x in sizes else int(x) for x in axes), dtype))
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 1, 2]))):
        place = draw(st.integers(0, len(buffers) - 1))
        shape, dtype = buffers[place]
        if draw(st.integers(0, 3)) == 0:
            dtype = draw(st.sampled_from(DTYPES))
        else:
            shape = draw(shapes(shape))
        buffers[place] = (shape, dtype)
    given, wanted = buffers[: len(arguments)], buffers[len(arguments) :]
    if draw(st.integers(0, 20)) == 0:
        given = draw(st.sampled_from([given[:-1], [*given, given[0]], given[:1]]))
    if draw(st.integers(0, 20)) == 0:
        wanted = draw(st.sampled_from([wanted[:-1] or wanted * 2, [*wanted, wanted[0]]]))
    return name, given, wanted


def run_native_calls(number: int) -> dict[str, int]:
    """Every call of a C function raises, or returns what was asked for."""
    counts = {"calls": 0, "refused": 0}
    assert native.has_native_functions()

    @settings(number)
    @hypothesis.given(native_calls())
    def run(call):
        name, given, wanted = call
        counts["calls"] += 1
        results = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in wanted]
        try:
            made = jax.ffi.ffi_call(name, results)(*(array(*buffer) for buffer in given))
            jax.block_until_ready(made)
        except jax.errors.JaxRuntimeError as error:
            counts["refused"] += 1
            if name not in str(error):
                raise

    run()
    return counts


def main() -> None:
    """Makes the calls that the command line names."""
    faulthandler.enable()
    _, kind, number = sys.argv
    counts = run_native_calls(int(number)) if kind == "native" else run_calls(kind, int(number))
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
