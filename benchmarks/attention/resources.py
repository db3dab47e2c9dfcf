"""Memory of training and decoding, and communication between the devices of one sequence."""

from collections.abc import Iterator
from typing import Any

import jax

from benchmarks.attention.report import Line, Measurement, Results, all_ends
from benchmarks.attention.variants import VARIANTS, config_of
from benchmarks.compiled_collectives import collectives
from benchmarks.measure import on_simulated_devices
from benchmarks.tables import Curves
from benchmarks.train_steps import compile_quickly, state_bytes, temporary_bytes
from simplernn_jax.config import MeshConfig
from simplernn_jax.training.gradient import abstract_model

DEVICES = 8


def measure_memory(lengths: tuple[int, ...], layers: int) -> dict[str, Any]:
    """Working memory of a train step on one sequence by XLA's memory analysis; decoder state."""
    curves: dict[str, Any] = {
        f"MB of a train step, {layers} layer(s)": lambda config: (
            temporary_bytes(compile_quickly(config)) / 1e6
        ),
        f"kB of decoder state, {layers} layer(s)": lambda config: state_bytes(config.model) / 1e3,
    }
    for quantity, measure in curves.items():
        curves[quantity] = {
            variant: {
                str(length): measure(config_of(variant, length, num_layers=layers))
                for length in lengths
            }
            for variant in VARIANTS
        }
    return {"curves": curves}


def measure_communication(lengths: tuple[int, ...]) -> dict[str, Any]:
    """Received by a device per layer in a train step on one sequence that is sharded over devices.

    Read from the compiled program. Gradients of parameters come on top, the same for both variants
    whatever the length.
    """
    curves = on_simulated_devices(DEVICES, count_all, lengths=lengths)
    return {"curves": {f"kB received per device and layer, {DEVICES} devices": curves}}


def count_all(lengths: tuple[int, ...]) -> Curves:
    """`received` in kB by variant and length; for `call_isolated`."""
    return {
        variant: {str(length): received(variant, length, DEVICES) / 1e3 for length in lengths}
        for variant in VARIANTS
    }


def received(variant: str, length: int, devices: int) -> float:
    """Bytes received by a device for one layer, without gradients of parameters and the loss."""
    config = config_of(variant, length, num_layers=1)
    config.mesh = MeshConfig(data=1, sequence=devices)
    found = collectives(compile_quickly(config))
    for leaf in jax.tree.leaves(abstract_model(config)[1]):
        found["all-reduce", leaf.size * 4] -= 1
    others = devices - 1
    factors = {
        "all-reduce": 2 * others / devices,
        "all-gather": others / devices,
        "reduce-scatter": others,
        "collective-permute": 1.0,
        "all-to-all": others / devices,
    }
    return sum(
        count * size * factors[kind]
        for (kind, size), count in found.items()
        if size > 8  # not scalars: loss, number of predictions, norm of the gradient
    )


def communication_lines(results: Results) -> Iterator[Line]:
    """Lines for all lengths."""
    for quantity, curves in results["curves"].items():
        for length in curves[VARIANTS[0]]:
            values = {variant: curves[variant][length] for variant in VARIANTS}
            yield Line("scalability", f"{quantity}, T {int(length):,}", values)


MEMORY = Measurement(
    measure_memory,
    all_ends("memory"),
    {"lengths": (1024, 65536), "layers": 1},
    {"lengths": (256, 1024, 4096, 16384, 65536), "layers": 4},
)
COMMUNICATION = Measurement(
    measure_communication,
    communication_lines,
    {"lengths": (4096, 65536)},
    {"lengths": (1024, 4096, 16384, 65536)},
)
