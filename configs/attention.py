"""`base` with softmax attention in the place of the recurrence, for a comparison of the two.

    python scripts/train.py --config configs/attention.py --workdir runs/attention

Attention has no forget gates; the MLP is wider by as many parameters.
"""

from configs import base
from simplernn_jax.config import Config


def get_config() -> Config:
    config = base.get_config()
    config.model.mixer = "attention"
    config.model.mlp_dim = 576
    return config
