"""Scalability: what devices that share one row tell each other, from the compiled train step.

The time axis of a row lies over the devices (mesh axis ``sequence``), simulated on this machine.
The sums of the parameters' gradients are the same on both sides whatever the length, and are left
out; what remains is what the mixer needs of other stretches, in both passes.
"""

from collections import Counter
from typing import Any, NamedTuple

import jax

from benchmarks.attention.sides import SIDES, config_of
from benchmarks.compiled_collectives import collectives
from benchmarks.isolated import call_isolated
from benchmarks.jax_steps import random_batch
from simplernn_jax.config import Config, MeshConfig
from simplernn_jax.sharding.mesh import make_mesh
from simplernn_jax.training.gradient import abstract_model
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.train_step import init_train_state, make_train_step

_COMPILED_SOON = {"xla_backend_optimization_level": 0}
"""Machine code as it comes; what the devices exchange is settled before."""


class Sizes(NamedTuple):
    """How much is measured."""

    lengths: tuple[int, ...]
    """Over the most devices."""
    devices: tuple[int, ...]
    """At the first length; the last is the most."""
    layers: int
    """Of the compiled model; the bytes are of one of them."""


QUICK = Sizes((4096, 65536), (2, 8), 1)
FULL = Sizes((1024, 4096, 16384, 65536), (2, 4, 8), 1)


def measure(sizes: Sizes) -> list[dict[str, Any]]:
    """Bytes that a device receives for one layer in a train step on one row, by side."""
    most = sizes.devices[-1]
    pairs = [(sizes.lengths[0], devices) for devices in sizes.devices[:-1]]
    pairs += [(length, most) for length in sizes.lengths]
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={most}", "JAX_PLATFORMS": "cpu"}
    rows: list[dict[str, Any]] = call_isolated(count_all, flags, pairs=pairs, layers=sizes.layers)
    return rows


def count_all(pairs: list[tuple[int, int]], layers: int) -> list[dict[str, Any]]:
    """`bytes_received` of every pair of a length and a number of devices; see `call_isolated`."""
    return [
        {
            "length": length,
            "devices": devices,
            "bytes": {side: bytes_received(side, length, devices, layers) for side in SIDES},
        }
        for length, devices in pairs
    ]


def bytes_received(side: str, length: int, devices: int, layers: int) -> float:
    """Per layer, on one device, without what the parameters' gradients and the loss need."""
    config = config_of(side, length, num_layers=layers)
    config.mesh = MeshConfig(data=1, sequence=devices)
    found = _exchanged(config)
    # Every parameter's gradient is summed once.
    for leaf in jax.tree.leaves(abstract_model(config)[1]):
        found["all-reduce", leaf.size * 4] -= 1
    return (
        sum(
            count * _received(kind, size, devices)
            for (kind, size), count in found.items()
            if size > 8  # single numbers: loss, count of predictions, norm of the gradient
        )
        / layers
    )


def _exchanged(config: Config) -> Counter[tuple[str, int]]:
    mesh = make_mesh(config.mesh, jax.devices()[: config.mesh.sequence])
    optimizer = make_optimizer(config.optimizer, 1, mesh)
    state = jax.eval_shape(lambda: init_train_state(config, optimizer))
    step: Any = make_train_step(config, optimizer, mesh)
    program = step.lower(state, random_batch(config)).compile(_COMPILED_SOON)
    return collectives(program)


def _received(kind: str, size: int, devices: int) -> float:
    """Bytes that a device must receive at least for a result of `size` bytes on each."""
    others = devices - 1
    factors = {
        "all-reduce": 2 * others / devices,
        "all-gather": others / devices,
        "reduce-scatter": others,
        "collective-permute": 1.0,
        "all-to-all": others / devices,
    }
    return size * factors[kind]
