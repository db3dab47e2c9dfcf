"""Held-out loss against training time: our configurations, and baselines of other architectures."""
