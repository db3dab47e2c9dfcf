"""Memory of training and decoding, and communication between the devices of one sequence."""

from functools import partial
from typing import Any

import jax

from benchmarks.attention.report import VARIANTS, Measurement, config_of, lines_of
from benchmarks.compiled_collectives import collectives
from benchmarks.measure import on_simulated_devices
from benchmarks.tables import curves_of
from benchmarks.train_steps import compile_quickly, megabytes, state_bytes
from simplernn_jax.training.gradient import abstract_model

DEVICES = 8


def measure_memory(lengths: tuple[int, ...], layers: int) -> dict[str, Any]:
    """Working memory of a train step on one sequence by XLA's memory analysis; decoder state."""
    quantities = {
        f"MB of a train step, {layers} layer(s)": lambda config: megabytes(compile_quickly(config)),
        f"kB of decoder state, {layers} layer(s)": lambda config: state_bytes(config.model) / 1e3,
    }

    def value(quantity: str, variant: str, length: int) -> float:
        return quantities[quantity](config_of(variant, length, num_layers=layers))

    curves = {each: curves_of(VARIANTS, lengths, partial(value, each)) for each in quantities}
    return {"curves": curves, "lines": lines_of("memory", curves)}


def measure_communication(lengths: tuple[int, ...]) -> dict[str, Any]:
    """Received by a device per layer in a train step on one sequence that is sharded over devices.

    Read from the compiled program. Gradients of parameters come on top, the same for both variants
    whatever the length.
    """
    received = on_simulated_devices(DEVICES, kilobytes_received, lengths=lengths, devices=DEVICES)
    curves = {f"kB received per device and layer, {DEVICES} devices": received}
    return {"curves": curves, "lines": lines_of("scalability", curves)}


def kilobytes_received(lengths: tuple[int, ...], devices: int) -> dict[str, dict[str, float]]:
    """By variant and length, without gradients of parameters and the loss."""
    return curves_of(VARIANTS, lengths, lambda v, n: _received(v, n, devices) / 1e3)


def _received(variant: str, length: int, devices: int) -> float:
    config = config_of(variant, length, num_layers=1, sequence=devices)
    found = collectives(compile_quickly(config).as_text())
    for leaf in jax.tree.leaves(abstract_model(config)[1]):
        found["all-reduce", leaf.size * 4] -= 1
    share = (devices - 1) / devices
    factors = {"all-reduce": 2 * share, "all-gather": share, "all-to-all": share}
    factors |= {"reduce-scatter": devices - 1, "collective-permute": 1}
    # No scalars: loss, number of predictions, norm of the gradient.
    return sum(n * size * factors[kind] for (kind, size), n in found.items() if size > 8)


MEMORY = Measurement(
    measure_memory,
    {"lengths": (1024, 65536), "layers": 1},
    {"lengths": (256, 1024, 4096, 16384, 65536), "layers": 4},
)
COMMUNICATION = Measurement(
    measure_communication, {"lengths": (4096, 65536)}, {"lengths": (1024, 4096, 16384, 65536)}
)
