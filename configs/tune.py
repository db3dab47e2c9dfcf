"""Tune a trained model on other text, by its initial state or by low-rank updates.

    python scripts/train.py --config configs/tune.py --workdir runs/mine \
        --config.train.init_from=runs/base --config.data.source=notes/ --config.train.tune=state

With ``lora:8`` in place of ``state``, the projections of the layers change too. See
docs/fine_tuning.md.
"""

from simplernn_jax.config import Config


def get_config() -> Config:
    config = Config()
    config.data.batch_size = 8
    config.optimizer.warmup_steps = 20
    config.train.steps = 500
    config.train.eval_every = 100
    config.train.save_every = 100
    config.train.sample_every = 0
    return config
