"""Types of arrays inside `jax.shard_map`, where each says over which mesh axes it varies.

A loop's carry must have one type from start to end: a zero that starts it is the same on every
device, what the loop adds is not. Outside of `shard_map` nothing here does anything.
"""

import jax


def vary_like(x: jax.Array, *others: jax.Array) -> jax.Array:
    """`x`, typed as varying over every manual mesh axis that it or one of `others` varies over."""
    wanted = frozenset[str]().union(*(varying(other) for other in others))
    missing = tuple(sorted(wanted - varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def varying(x: jax.Array) -> frozenset[str]:
    """The manual mesh axes over which `x` varies."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)
