"""A first run: Python's own standard library, byte by byte.

python scripts/train.py --config configs/base.py --workdir runs/base
"""

from simplernn_jax.config import Config


def get_config() -> Config:
    config = Config()
    config.train.steps = 1200
    config.train.sample_prompt = "def main("
    return config
