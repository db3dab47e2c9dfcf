"""AdamW or Muon with warm-up, cosine decay, a weight-decay mask and global-norm clipping."""

from typing import Any

import jax
import optax
import optax.contrib

from simplernn_jax.config import OptimizerConfig

MUON_MOMENTUM = 0.95
"""As published with Muon (github.com/KellerJordan/Muon)."""

MUON_RMS = 0.2
"""Root mean square of Muon's updates, near that of AdamW's, so that both take alike
learning rates (arXiv:2502.16982, section 2.2)."""


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by the number of updates taken: linear to its peak, then half a cosine.

    It starts at 1/warmup of the peak, since a first update of 0 would be wasted, and would reach
    its final fraction with one update more than there are.
    """
    warmup = min(config.warmup_steps, total_steps)
    decay = optax.cosine_decay_schedule(
        config.learning_rate, max(total_steps - warmup, 1), alpha=config.final_learning_rate
    )
    if not warmup:
        return decay
    return optax.join_schedules(
        [optax.linear_schedule(config.learning_rate / warmup, config.learning_rate, warmup), decay],
        [warmup],
    )


def decay_mask(params: Any) -> Any:
    """True for what is decayed: matrices of dense layers, not biases, norms, the embedding or
    the convolution."""

    def is_decayed(path: tuple[Any, ...], leaf: Any) -> bool:
        name = jax.tree_util.keystr(path)
        return leaf.ndim >= 2 and "embedding" not in name and "convolution" not in name

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """The optimizer of a run; ``adamw`` with weight_decay 0 is Adam."""
    learning_rate = learning_rate_schedule(config, total_steps)
    if config.name == "muon":
        optimizer = optax.contrib.muon(
            learning_rate,
            beta=MUON_MOMENTUM,
            weight_decay=config.weight_decay,
            weight_decay_mask=decay_mask,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            eps=config.epsilon,
            muon_weight_dimension_numbers=_orthogonalised,
            consistent_rms=MUON_RMS,
        )
    else:
        optimizer = optax.adamw(
            learning_rate,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        )
    # Always two parts, so that a run can be resumed with another clip_norm.
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, optimizer)


def _orthogonalised(params: Any) -> Any:
    """For Muon: the axes of every matrix it takes; None leaves a parameter to Adam."""
    return jax.tree.map(
        lambda decayed: optax.contrib.MuonDimensionNumbers(0, 1) if decayed else None,
        decay_mask(params),
    )
