"""Matrices in fewer bits, and packed for the C function of decoding.

Weights are stored in fewer bits. Products with bfloat16 are float32. For products with int8 and
int4, activations are rounded to 16 bits, with a scale for each 512 or 64 of them, and the sums are
those of integers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from simplernn_jax.ops.checks import check_array

FORMATS = ("float32", "bfloat16", "int8", "int4")
"""int8 has a float32 scale for each output, int4 one for each output and `GROUP` inputs."""

PANEL, GROUP = 64, 64
"""Outputs of a panel, and inputs that share a scale of int4; as in `panels.h`."""

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "int8": jnp.int32, "int4": jnp.uint32}
"""Those of packed values: words of 4 or 8 integers differ in signedness only."""
_LARGEST = {"int8": 127, "int4": 7}
_TOGETHER = {"int32": 4, "uint32": 8}
"""Inputs of a word of each dtype."""


class PackedMatrix(NamedTuple):
    """A matrix ``[..., in, out]`` as the C function reads it; see `panels.h`."""

    values: jax.Array
    """[..., panels, in, PANEL] float32 or bfloat16; or words, [..., panels, in / 4, PANEL] int32 of
    four int8, or [..., panels, in / 8, PANEL] uint32 of eight int4."""
    scales: jax.Array
    """[..., panels, groups, PANEL] float32, by which the values are multiplied."""

    def check(
        self, name: str, leading: tuple[int, ...], shape: tuple[int, int], dtype: Any
    ) -> None:
        """Check that this is ``[*leading, *shape]`` of `dtype`; raises ValueError or TypeError."""
        inputs, outputs = shape
        together = _TOGETHER.get(str(dtype), 1)
        sizes = {f"leading{i}": size for i, size in enumerate(leading)}
        sizes |= {"panels": -(-outputs // PANEL), "PANEL": PANEL}
        sizes["in"] = -(-inputs // together)
        sizes["groups"] = -(-inputs // GROUP) if together == 8 else 1
        axes = " ".join(f"leading{i}" for i in range(len(leading)))
        dtypes = [str(jnp.dtype(each)) for each in _DTYPES.values()]
        wanted = (str(dtype),) if str(dtype) in dtypes else tuple(dtypes)
        check_array(name, self.values, f"{axes} panels in PANEL", wanted, sizes)
        check_array(name, self.scales, f"{axes} panels groups PANEL", ("float32",), sizes)


def quantize(matrix: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
    """Quantize ``[..., in, out]`` float32 to one of `FORMATS`, to the nearest value.

    Returns:
      Values ``[..., in, out]``, int4 ones as int8, and scales ``[..., groups, out]``: a value times
      the scale of its group is the weight. The largest weight of a group is a multiple of its
      scale, so that quantizing again gives the same values.
    """
    *leading, inputs, outputs = matrix.shape
    if kind not in _LARGEST:
        return matrix.astype(_DTYPES[kind]), jnp.ones((*leading, 1, outputs), jnp.float32)
    group = GROUP if kind == "int4" else inputs
    num_groups = -(-inputs // group)
    padding = [(0, 0)] * len(leading) + [(0, num_groups * group - inputs), (0, 0)]
    grouped = jnp.pad(matrix, padding).reshape(*leading, num_groups, group, outputs)
    scales = jnp.max(jnp.abs(grouped), axis=-2) / _LARGEST[kind]
    scales = jnp.where(scales > 0, scales, 1)
    values = jnp.rint(grouped / scales[..., None, :]).astype(jnp.int8)
    return values.reshape(*leading, -1, outputs)[..., :inputs, :], scales


def rounded(matrix: jax.Array, kind: str) -> jax.Array:
    """Round ``[..., in, out]`` to the float32 values that a format can hold."""
    values, scales = quantize(matrix, kind)
    group = GROUP if kind == "int4" else matrix.shape[-2]
    scales = jnp.repeat(scales, group, axis=-2)[..., : matrix.shape[-2], :]
    return values.astype(jnp.float32) * scales


def pack(matrix: jax.Array, kind: str, output_scale: jax.Array | None = None) -> PackedMatrix:
    """Quantize ``[..., in, out]`` float32 and pack it.

    Args:
      matrix: the matrix.
      kind: one of `FORMATS`.
      output_scale: ``[out]``, by which the outputs are multiplied after rounding; None is 1.
    """
    values, scales = quantize(matrix, kind)
    if output_scale is not None:
        scales = scales * jnp.expand_dims(output_scale, range(scales.ndim - 1))
    values, scales = _panels(values), _panels(scales)
    if kind in _LARGEST:
        values = _words(values, _TOGETHER[jnp.dtype(_DTYPES[kind]).name]).astype(_DTYPES[kind])
    if kind == "bfloat16":  # two columns of a half panel each share 32 bits
        halves = values.reshape(*values.shape[:-1], 2, PANEL // 2)
        values = jnp.swapaxes(halves, -1, -2).reshape(values.shape)
    return PackedMatrix(values, scales)


def _words(values: jax.Array, together: int) -> jax.Array:
    """Join `together` inputs of ``[..., in, PANEL]`` int8 to one uint32: see `panels.h`."""
    *leading, inputs, _ = values.shape
    padding = [(0, 0)] * len(leading) + [(0, -inputs % together), (0, 0)]
    bits = 32 // together
    stored = (values.astype(jnp.int32) + (1 << (bits - 1))).astype(jnp.uint32)
    parts = jnp.pad(stored, padding).reshape(*leading, -1, together, PANEL)
    place = jnp.arange(together, dtype=jnp.uint32)[:, None]
    shifts = place // 2 * bits + place % 2 * 16
    return jnp.sum(parts << jnp.broadcast_to(shifts, parts.shape), axis=-2, dtype=jnp.uint32)


def _panels(x: jax.Array) -> jax.Array:
    """Cut ``[..., in, out]`` into ``[..., panels, in, PANEL]``, the last filled with zeros."""
    *leading, inputs, outputs = x.shape
    padding = [(0, 0)] * (len(leading) + 1) + [(0, -outputs % PANEL)]
    x = jnp.pad(x, padding).reshape(*leading, inputs, -1, PANEL)
    return jnp.swapaxes(x, -2, -3)
