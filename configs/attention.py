"""`base` with softmax attention instead of the recurrence, for comparison.

    python scripts/train.py --config configs/attention.py --workdir runs/attention

Attention has no forget gates; a wider MLP makes up for their parameters.
"""

from simplernn_jax import load_config
from simplernn_jax.config import Config


def get_config() -> Config:
    config = load_config("base")
    config.model.mixer = "attention"
    config.model.mlp_dim = 576
    return config
