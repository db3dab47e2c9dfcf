"""Dtypes of sums."""

from typing import Any

import jax.numpy as jnp


def accumulator_dtype(*arrays: Any) -> Any:
    """Return the accumulation dtype of arrays or dtypes: float64 if one is, else float32."""
    dtypes = [jnp.dtype(getattr(x, "dtype", x)) for x in arrays]
    return jnp.dtype("float64" if jnp.dtype("float64") in dtypes else "float32")
