"""Benchmarks of ``scripts/benchmark.py`` and the experiments of ``scripts/stress.py``.

A benchmark is a function that measures and yields tables (`tables.Table`), which
``scripts/benchmark.py`` names, prints and keeps.
"""
