"""What ``scripts/benchmark.py`` measures.

A benchmark is a module with ``run(effort)``, which measures, prints a table and returns what goes
into the JSON; ``BENCHMARKS`` in ``scripts/benchmark.py`` gives it its name.
"""
