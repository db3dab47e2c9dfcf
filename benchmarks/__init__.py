"""Benchmarks of ``scripts/benchmark.py`` and experiments of ``scripts/stress.py``."""
