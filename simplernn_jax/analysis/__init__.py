"""Analysis of a trained model: which tokens its outputs come from, and its memory of them.

May import every other subpackage; only scripts and benchmarks import this one.
"""

from simplernn_jax.analysis.decomposition import (
    attention_map,
    decompose_layers,
    gradient_contributions,
    is_exact,
    map_contributions,
)
from simplernn_jax.analysis.explanation import Explanation, explain
from simplernn_jax.analysis.memory import effective_rank, half_life, measure_memory
from simplernn_jax.analysis.recording import find_mixers, record
from simplernn_jax.analysis.state_value import loss_by_position, loss_by_reset

__all__ = [
    "Explanation",
    "attention_map",
    "decompose_layers",
    "effective_rank",
    "explain",
    "find_mixers",
    "gradient_contributions",
    "half_life",
    "is_exact",
    "loss_by_position",
    "loss_by_reset",
    "map_contributions",
    "measure_memory",
    "record",
]
