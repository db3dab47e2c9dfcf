"""Alias of `pytorch_reference` under its older name: ``--config configs/seed.py``."""

from configs.pytorch_reference import get_config  # noqa: F401
