"""Benchmarks of ``scripts/benchmark.py`` and the experiments of ``scripts/stress.py``.

A benchmark is a module with ``run(effort)``, which measures, prints a table and returns results
that JSON can hold; ``BENCHMARKS`` in ``scripts/benchmark.py`` gives it its name.
"""
