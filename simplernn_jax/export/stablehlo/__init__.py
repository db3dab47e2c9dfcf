"""Prefill and decoding as portable StableHLO, for CPU, CUDA and TPU."""
