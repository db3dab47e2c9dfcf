"""Benchmarks of ``scripts/benchmark.py`` and the experiments of ``scripts/stress.py``.

A benchmark is a module with ``run(effort)``, which measures and yields tables, each with its title;
``BENCHMARKS`` in ``scripts/benchmark.py`` gives it its name.
"""
