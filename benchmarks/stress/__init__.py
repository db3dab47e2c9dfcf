"""Experiments of ``scripts/stress.py``: each injects faults and checks a promise."""
