"""The mesh of devices, checks that a run can be sharded over it, and the shardings of its arrays.

Parameters and states name their logical axes where they are created; `LOGICAL_AXIS_RULES` map them
to mesh axes. Axes named None are replicated.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeGuard

import jax
from absl import logging
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from simplernn_jax.array_types import LogicalAxes
from simplernn_jax.config import Config, MeshConfig
from simplernn_jax.errors import UserError
from simplernn_jax.parallel.sequence import min_shard_tokens

AXES = ("data", "fsdp", "tensor", "sequence", "pipeline")
"""Mesh axes, from the slowest link to the fastest except `pipeline`; see `MeshConfig`."""

BATCH_AXES = ("data", "fsdp")
"""Axes over which the sequences of a batch are sharded."""

TOKEN_AXES = (*BATCH_AXES, "sequence", "pipeline")
"""Axes whose devices take the loss of different tokens: losses and gradients are sums over them."""

LOGICAL_AXIS_RULES: dict[str, str | tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "time": "sequence",
    "embed": "fsdp",
    "rank": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": "pipeline",
}


def partition_spec(axes: LogicalAxes, mesh: Mesh) -> P:
    """Map logical axes to axes of `mesh` with several devices; ValueError for an unknown name."""
    for axis in {*axes} - {None, *LOGICAL_AXIS_RULES}:
        raise ValueError(f"logical axis {axis!r}: must be None or one of {[*LOGICAL_AXIS_RULES]}")
    mapped = (axis and LOGICAL_AXIS_RULES[axis] for axis in axes)
    return drop_trivial_axes(P(*mapped), mesh)


def drop_trivial_axes(spec: P, mesh: Mesh) -> P:
    """Leave the mesh axes of one device out of `spec`."""

    def keep(names: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if names is None or isinstance(names, str):
            return names if names and mesh.shape[names] > 1 else None
        return tuple(name for name in names if mesh.shape[name] > 1) or None

    return P(*map(keep, spec))


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Create the mesh over `devices` (None: all devices of every process), axes `AXES`.

    If the sizes use only some of one process's devices, the first are taken, with a warning.

    Raises:
      UserError: the sizes do not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {name: getattr(config, name) for name in AXES}
    others = math.prod(size for name, size in sizes.items() if name != "data")
    if sizes["data"] is None:
        sizes["data"] = max(1, len(devices) // others)
    needed = math.prod(sizes.values())
    processes = {device.process_index for device in devices}
    if len(devices) % needed or (len(processes) > 1 and needed != len(devices)):
        product = " * ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(
            f"config.mesh: {product} = {needed} devices, and this run has {len(devices)}; change "
            "the sizes, or set data to none, which takes the devices that remain"
        )
    if needed < len(devices):
        logging.warning("config.mesh uses %d of %d devices", needed, len(devices))
    return jax.make_mesh(
        tuple(sizes.values()),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=devices[:needed],
    )


def describe(mesh: Mesh) -> str:
    """Describe the devices of a run: ``cpu``, or ``8 x cpu (data 2, fsdp 4)``."""
    kind: str = mesh.devices.flat[0].device_kind
    sizes = [f"{name} {size}" for name, size in mesh.shape.items() if size > 1]
    return f"{mesh.size} x {kind} ({', '.join(sizes)})" if sizes else kind


def check_fits(config: Config, mesh: Mesh) -> None:
    """Raise `UserError` if the mesh does not divide all that it shards; names field and sizes."""
    model, data, sizes = config.model, config.data, mesh.shape
    groups = config.train.gradient_accumulation or 1
    # The tokens of each BPTT window are sharded.
    tokens, time = data.sequence_length, "data.sequence_length"
    if config.train.bptt_window:
        tokens, time = config.train.bptt_window, "train.bptt_window"
    for field, value, axes, times in (
        ("data.batch_size", data.batch_size, BATCH_AXES, groups),
        (time, tokens, ("sequence", "pipeline"), 1),
        ("model.num_heads", model.num_heads, ("tensor",), 1),
        # A plain block has no MLP.
        ("model.mlp_dim", 0 if model.block == "plain" else model.mlp_dim, ("tensor",), 1),
        ("model.vocab_size", model.vocab_size, ("tensor",), 1),
        ("model.hidden_dim", model.hidden_dim, ("fsdp",), 1),
        ("model.num_layers", model.num_layers, ("pipeline",), 1),
    ):
        divisor = math.prod(sizes[axis] for axis in axes) * times
        if value % divisor:
            arithmetic = " * ".join(f"{axis} {sizes[axis]}" for axis in axes)
            if times > 1:
                arithmetic += f" * gradient_accumulation {times}"
            raise UserError(
                f"config.{field}={value} is not divisible by {arithmetic}: {value} / "
                f"{divisor} leaves {value % divisor}; change it or config.mesh"
            )
    kinds = Counter(model.mixers)
    if sizes["pipeline"] > 1 and len(kinds) > 1:
        found = ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
        raise UserError(
            f"config.model.mixer={model.mixer!r} cannot be sharded over pipeline "
            f"{sizes['pipeline']}: stages need layers of one kind, and these are {found}; specify "
            "one mixer or set config.mesh.pipeline=1"
        )
    shard = tokens // sizes["sequence"]
    needed = min_shard_tokens(model)
    if sizes["sequence"] > 1 and shard < needed:
        raise UserError(
            f"config.{time}={tokens} leaves each device of sequence "
            f"{sizes['sequence']} a shard of {shard}, and the short convolution needs "
            f"{needed} tokens; change it or config.mesh"
        )


def is_distributed(mesh: Mesh | None) -> TypeGuard[Mesh]:
    """Return whether several devices share the work."""
    return mesh is not None and mesh.size > 1


def is_on_cpu(mesh: Mesh | None) -> bool:
    """Return whether the devices, None for the first one, are CPUs."""
    device: jax.Device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return device.platform == "cpu"


def variable_specs(tree: Any, mesh: Mesh) -> Any:
    """Return the `PartitionSpec` of every array of a tree of `nnx.Variable` and other arrays.

    The logical axes of a variable are its metadata ``axes``; the moments that an optimizer keeps of
    a parameter have the parameter's axes. All other arrays are replicated.
    """

    def spec_of(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return P()
        axes = leaf.get_metadata("axes", LogicalAxes())
        return jax.tree.map(lambda _: partition_spec(axes, mesh), leaf)

    return jax.tree.map(spec_of, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def axes_specs(axes: Any, mesh: Mesh) -> Any:
    """Return the `PartitionSpec` of every `LogicalAxes` of a tree."""
    return jax.tree.map(lambda each: partition_spec(each, mesh), axes)


def named_shardings(specs: Any, mesh: Mesh) -> Any:
    """Return the `NamedSharding` of every `PartitionSpec` of a tree."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def shard_further(tree: Any, specs: Any, axis: str, mesh: Mesh) -> Any:
    """Return `specs` with every leaf of `tree` sharded over `axis` too, where it is divisible."""

    def spec_of(leaf: Any, spec: P) -> P:
        names = [*spec, *[None] * (leaf.ndim - len(spec))]
        for place, size in enumerate(leaf.shape):
            present = names[place] if isinstance(names[place], tuple) else (names[place],)
            together = (*(name for name in present if name), axis)
            if size % math.prod(mesh.shape[name] for name in together) == 0:
                return P(*names[:place], together, *names[place + 1 :])
        return spec

    return jax.tree.map(spec_of, tree, specs)


def process_slice(sharding: NamedSharding, length: int) -> slice:
    """Return the slice of a first axis of size `length` that this process's devices hold."""
    indices = sharding.addressable_devices_indices_map((length,)).values()
    ranges = [index[0].indices(length) for index in indices if index is not None]
    return slice(min(start for start, *_ in ranges), max(stop for _, stop, _ in ranges))


def global_arrays_from_local(local: Any, shardings: Any, start: int, length: int) -> Any:
    """Assemble a tree of global arrays from each process's slice of the first axis.

    Args:
      local: tree of numpy arrays: this process's slice of each array, which covers the shards of
        its devices (`process_slice`).
      shardings: shardings of the global arrays.
      start: index in the global arrays where `local` starts.
      length: size of the first axis of the global arrays.
    """

    def assemble(leaf: Any, sharding: NamedSharding) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> Any:
            assert index is not None
            begin, end, _ = index[0].indices(length)
            return leaf[(slice(begin - start, end - start), *index[1:])]

        return jax.make_array_from_callback((length, *leaf.shape[1:]), sharding, shard)

    return jax.tree.map(assemble, local, shardings)


def local_copy(tree: Any) -> Any:
    """Gather the arrays of `tree` onto one device of this process; to be called by every process.

    Arrays on one device are returned as they are.
    """
    leaves = jax.tree.leaves(tree)
    if all(len(leaf.sharding.device_set) == 1 for leaf in leaves):
        return tree
    replicated = NamedSharding(leaves[0].sharding.mesh, P())
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), jax.device_put(tree, replicated))
