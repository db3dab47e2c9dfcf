"""Matrices in fewer bits, and packed for the C function of decoding.

Products with bfloat16 are float32. For products with int8 and int4, activations are rounded to 16
bits, with a scale for each 512 or 64 of them, and sums are integers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

FORMATS = ("float32", "bfloat16", "int8", "int4")
"""int8 has a float32 scale for each output, int4 one for each output and `GROUP` inputs."""

PANEL, GROUP = 64, 64
"""Outputs of a panel, and inputs that share a scale of int4; as in `panels.h`."""

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "int8": jnp.int32, "int4": jnp.uint32}
"""Those of packed values: words of 4 or 8 integers differ in signedness only."""
_LOWEST = {"int8": -128, "int4": -8}
_CLIPS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Parts of the largest magnitude of an int4 group to which `rounded` may clip it."""
_VALUES_PER_WORD = {"int8": 4, "int4": 8}


class PackedMatrix(NamedTuple):
    """A matrix ``[..., in, out]`` as the C function reads it; see `panels.h`."""

    values: jax.Array
    """[..., panels, in, PANEL] float32 or bfloat16; or words, [..., panels, in / 4, PANEL] int32 of
    four int8, or [..., panels, in / 8, PANEL] uint32 of eight int4."""
    scales: jax.Array
    """[..., panels, groups, PANEL] float32, by which the values are multiplied."""


def quantize(matrix: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
    """Quantize ``[..., in, out]`` float32 to one of `FORMATS`, without clipping.

    Returns:
      Values ``[..., in, out]``, int4 ones as int8, and scales ``[..., groups, out]``, which may be
      negative: a value times the scale of its group is the weight. The weight of a group with the
      largest magnitude has the lowest value, and one of the opposite sign near it is off by up to
      one scale. Quantizing the products again changes nothing.
    """
    *leading, inputs, outputs = matrix.shape
    if kind not in _LOWEST:
        return matrix.astype(_DTYPES[kind]), jnp.ones((*leading, 1, outputs), jnp.float32)
    values, scales = _nearest(_grouped(matrix, kind), kind)
    return _ungrouped(values.astype(jnp.int8), inputs), scales[..., 0, :]


def rounded(matrix: jax.Array, kind: str) -> jax.Array:
    """Round ``[..., in, out]`` to float32 values that a format can hold, and `quantize` keeps.

    Each int4 group gets the scale with the least squared error among a few that clip it.
    """
    if kind not in _LOWEST:
        return matrix.astype(_DTYPES[kind]).astype(jnp.float32)
    grouped = _grouped(matrix, kind)
    best = _rounded_groups(grouped, 1.0, kind)
    for clip in _CLIPS if kind == "int4" else ():
        other = _rounded_groups(grouped, clip, kind)
        errors = [jnp.sum((x - grouped) ** 2, axis=-2, keepdims=True) for x in (best, other)]
        best = jnp.where(errors[1] < errors[0], other, best)
    return _ungrouped(best, matrix.shape[-2])


def _grouped(matrix: jax.Array, kind: str) -> jax.Array:
    """Reshape ``[..., in, out]`` to ``[..., groups, group, out]``, the last filled with zeros."""
    *leading, inputs, outputs = matrix.shape
    group = GROUP if kind == "int4" else inputs
    padding = [(0, 0)] * len(leading) + [(0, -inputs % group), (0, 0)]
    return jnp.pad(matrix, padding).reshape(*leading, -1, group, outputs)


def _ungrouped(grouped: jax.Array, inputs: int) -> jax.Array:
    """Undo `_grouped`, for a matrix of `inputs`."""
    *leading, _, _, outputs = grouped.shape
    return grouped.reshape(*leading, -1, outputs)[..., :inputs, :]


def _nearest(grouped: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
    """Return integers ``[..., groups, group, out]`` and scales ``[..., groups, 1, out]``."""
    lowest = _LOWEST[kind]
    largest, smallest = (f(grouped, axis=-2, keepdims=True) for f in (jnp.max, jnp.min))
    scales = jnp.where(largest > -smallest, largest, smallest) / lowest
    scales = jnp.where(scales == 0, 1, scales)
    return jnp.clip(jnp.rint(grouped / scales), lowest, -lowest - 1), scales


def _rounded_groups(grouped: jax.Array, clip: float, kind: str) -> jax.Array:
    """Round groups that are clipped to a part of their largest magnitude."""
    limit = clip * jnp.max(jnp.abs(grouped), axis=-2, keepdims=True)
    values, scales = _nearest(jnp.clip(grouped, -limit, limit), kind)
    return values * scales


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
    if kind in _LOWEST:
        values = _words(values, _VALUES_PER_WORD[kind]).astype(_DTYPES[kind])
    if kind == "bfloat16":  # two columns of a half panel each share 32 bits
        halves = values.reshape(*values.shape[:-1], 2, PANEL // 2)
        values = jnp.swapaxes(halves, -1, -2).reshape(values.shape)
    return PackedMatrix(values, scales)


def _words(values: jax.Array, values_per_word: int) -> jax.Array:
    """Join `values_per_word` inputs of ``[..., in, PANEL]`` int8 to one uint32: see `panels.h`."""
    *leading, inputs, _ = values.shape
    padding = [(0, 0)] * len(leading) + [(0, -inputs % values_per_word), (0, 0)]
    bits = 32 // values_per_word
    stored = (values.astype(jnp.int32) + (1 << (bits - 1))).astype(jnp.uint32)
    parts = jnp.pad(stored, padding).reshape(*leading, -1, values_per_word, PANEL)
    place = jnp.arange(values_per_word, dtype=jnp.uint32)[:, None]
    shifts = place // 2 * bits + place % 2 * 16
    return jnp.sum(parts << jnp.broadcast_to(shifts, parts.shape), axis=-2, dtype=jnp.uint32)


def _panels(x: jax.Array) -> jax.Array:
    """Cut ``[..., in, out]`` into ``[..., panels, in, PANEL]``, the last filled with zeros."""
    *leading, inputs, outputs = x.shape
    padding = [(0, 0)] * (len(leading) + 1) + [(0, -outputs % PANEL)]
    x = jnp.pad(x, padding).reshape(*leading, inputs, -1, PANEL)
    return jnp.swapaxes(x, -2, -3)
