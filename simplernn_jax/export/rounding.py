"""Rounding of weights to float16 or int8, as files for HTML and ONNX store them."""

import numpy as np

from simplernn_jax.models.named_weights import Weights


def int8_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round a matrix to ``scale[:, None] * integers``, one scale for each row; both by row."""
    scale = np.abs(weight).max(axis=1, keepdims=True).astype(np.float32) / np.float32(127)
    scale[scale == 0] = 1
    return np.rint(weight / scale).astype(np.int8), scale[:, 0]


def float16(weight: np.ndarray) -> np.ndarray:
    """Round to float16, values beyond its range to the largest one."""
    largest = np.finfo(np.float16).max
    return np.clip(weight, -largest, largest).astype(np.float16)


def is_rounded(weight: np.ndarray) -> bool:
    """Return whether a weight is stored in fewer bits: not vectors and filters, which are small."""
    return weight.ndim == 2 and weight.shape[1] > 4


def rounded_weights(weights: Weights, kind: str) -> dict[str, np.ndarray]:
    """Return the weights as float32 arrays that have been rounded to `kind`."""
    return {name: _rounded(weight, kind) for name, weight in weights.items()}


def _rounded(weight: np.ndarray, kind: str) -> np.ndarray:
    if kind == "none" or not is_rounded(weight):
        return weight
    if kind == "float16":
        return float16(weight).astype(np.float32)
    integers, scale = int8_rows(weight)
    return integers.astype(np.float32) * scale[:, None]
