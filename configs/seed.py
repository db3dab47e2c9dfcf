"""Alias of `pytorch_reference`, for commands that use its older name.

python scripts/train.py --config configs/seed.py --workdir runs/seed
"""

from simplernn_jax.configs.pytorch_reference import get_config  # noqa: F401
