"""Experiments of ``scripts/stress.py``: each injects faults, and checks what is promised."""
