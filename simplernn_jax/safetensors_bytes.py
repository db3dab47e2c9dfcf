"""Decode arrays of the safetensors format from bytes, which the caller has verified."""

import jax.numpy as jnp
import numpy as np
import safetensors

_DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


def decode_safetensors(content: bytes) -> dict[str, np.ndarray]:
    """Return the arrays by name.

    Raises:
      ValueError: `content` is corrupted or has arrays of an unsupported dtype, such as float8.
    """
    arrays = {}
    try:
        parts = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error
    for name, part in parts:
        if part["dtype"] not in _DTYPES:
            raise ValueError(f"{name!r} has the unsupported dtype {part['dtype']}")
        flat = np.frombuffer(part["data"], _DTYPES[part["dtype"]])
        arrays[name] = flat.reshape(part["shape"])
    return arrays
