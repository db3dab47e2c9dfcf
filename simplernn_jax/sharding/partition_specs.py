"""Where each array of a run lies on the mesh: one table, by the names of the arrays.

Parts along ``fsdp`` and ``tensor`` make up one copy of a parameter; along ``data`` and
``sequence`` every device has its own copy. What the optimizer keeps of a parameter lies as it
does, since its name ends alike. Stacked layers lie apart along ``stage``.
"""

import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from simplernn_jax.sharding.layer_layout import layer_axis, single_name
from simplernn_jax.sharding.mesh import BATCH_AXES

P = PartitionSpec

_RULES = (
    # Sums over the inputs of all devices; the bias is added once.
    (r"(out_proj|mlp_out)/kernel", P("tensor", "fsdp")),
    (r"(out_proj|mlp_out)/bias", P()),
    # Outputs of each device's own.
    (r"kernel", P("fsdp", "tensor")),
    (r"bias", P("tensor")),
    (r"embedding/embedding", P("tensor", "fsdp")),
)
"""By the end of a parameter's name, the first that fits: what lies along which axis. All other
parameters (norms, the convolution) are small and whole on every device."""

_CARRIED_RULES = (
    (r"carried/\d+/(recent|mixer/length)", P(BATCH_AXES)),
    # By heads: the recurrence's state, or attention's cache.
    (r"carried/\d+(/mixer(/(keys|values))?)?", P(BATCH_AXES, "tensor")),
)


def specs_of(tree: Any, mesh: Mesh) -> Any:
    """The `PartitionSpec` of every leaf of a training state, or of a part of one."""

    def spec_of(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axis = layer_axis(name)
        if axis is None:
            return drop_trivial_axes(of_single(name), mesh) if leaf.ndim else P()
        single = of_single(single_name(name, 0))
        spec = (*single, *[None] * (axis - len(single)))
        return drop_trivial_axes(P(*spec[:axis], "stage", *spec[axis:]), mesh)

    def of_single(name: str) -> PartitionSpec:
        name = name.removesuffix("/value")
        carried = [spec for rule, spec in _CARRIED_RULES if re.fullmatch(rule, name)]
        of_parameter = [spec for rule, spec in _RULES if re.search(f"(^|/){rule}$", name)]
        return [*carried, *of_parameter, P()][0]

    return jax.tree_util.tree_map_with_path(spec_of, tree)


def apart(tree: Any, specs: Any, axis: str, mesh: Mesh) -> Any:
    """`specs` with every leaf of `tree` divided along the mesh axis `axis` too, if it can be."""

    def spec_of(leaf: Any, spec: PartitionSpec) -> PartitionSpec:
        names = [*spec, *[None] * (leaf.ndim - len(spec))]
        for place, size in enumerate(leaf.shape):
            divided = names[place] if isinstance(names[place], tuple) else (names[place],)
            divided = (*(name for name in divided if name), axis)
            if size % math.prod(mesh.shape[name] for name in divided) == 0:
                return P(*names[:place], divided, *names[place + 1 :])
        return spec

    return jax.tree.map(spec_of, tree, specs)


def drop_trivial_axes(spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    """`spec` without the axes of one device: what lies along them is not apart."""

    def keep(names: Any) -> Any:
        if names is None or isinstance(names, str):
            return names if names and mesh.shape[names] > 1 else None
        kept = tuple(name for name in names if mesh.shape[name] > 1)
        return kept or None

    return P(*map(keep, spec))
