"""AdamW with warm-up, cosine decay, a weight-decay mask and global-norm clipping."""

from typing import Any

import jax
import optax

from simplernn_jax.config import OptimizerConfig


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
    """True for what is decayed: matrices of dense layers, not biases, norms or the embedding."""

    def is_decayed(path: tuple[Any, ...], leaf: Any) -> bool:
        return leaf.ndim >= 2 and "embedding" not in jax.tree_util.keystr(path)

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """The optimizer of a run; with weight_decay 0 it is Adam."""
    adamw = optax.adamw(
        learning_rate_schedule(config, total_steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if not config.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
