"""Analysis of a trained model: which tokens its outputs come from, and its memory of them.

May import every other subpackage; only scripts and benchmarks import this one.
"""

from simplernn_jax.analysis.decomposition import (
    attention_map,
    decompose_layers,
    find_mixers,
    gradient_contributions,
    is_exact,
    map_contributions,
    record,
)
from simplernn_jax.analysis.explanation import Explanation, explain
from simplernn_jax.analysis.memory import loss_by_position, measure_half_lives

__all__ = [
    "Explanation",
    "attention_map",
    "decompose_layers",
    "explain",
    "find_mixers",
    "gradient_contributions",
    "is_exact",
    "loss_by_position",
    "map_contributions",
    "measure_half_lives",
    "record",
]
