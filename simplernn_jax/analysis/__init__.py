"""Looks into a trained model: where its outputs come from, how long it remembers, what for.

May use every other room; only scripts use this one.
"""

from simplernn_jax.analysis.accounts import account_for, account_for_layers, is_exact
from simplernn_jax.analysis.attention_map import attention_map, read_values
from simplernn_jax.analysis.contributions import gradient_contributions, map_contributions
from simplernn_jax.analysis.explanation import Explanation, explain
from simplernn_jax.analysis.memory import effective_rank, half_life, measure_memory
from simplernn_jax.analysis.recording import find_mixers, record
from simplernn_jax.analysis.state_value import loss_by_position, loss_by_reset

__all__ = [
    "Explanation",
    "account_for",
    "account_for_layers",
    "attention_map",
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
    "read_values",
    "record",
]
