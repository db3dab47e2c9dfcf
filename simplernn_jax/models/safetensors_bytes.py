"""Arrays of the safetensors format as bytes, and digests of them."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

_DTYPES: dict[str, Any] = {
    **{"BOOL": np.bool_, "U8": np.uint8},
    **{"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64},
    **{"BF16": jnp.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64},
}
"""`safetensors.numpy` has no bfloat16."""


def decode_safetensors(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the arrays by name, and the metadata.

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
        arrays[name] = np.frombuffer(part["data"], _DTYPES[part["dtype"]]).reshape(part["shape"])
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return arrays, header.get("__metadata__") or {}


def digest_of(header: Mapping[str, Any], arrays: Mapping[str, Any]) -> str:
    """SHA-256 hex over a JSON-able header and the names, dtypes, shapes and bytes of arrays."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        array = np.asarray(array)
        digest.update(f"\n{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
