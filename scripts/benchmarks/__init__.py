"""What ``scripts/benchmark.py`` measures; each benchmark is a module with `run`."""
