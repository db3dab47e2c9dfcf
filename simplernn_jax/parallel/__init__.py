"""Meshes, shardings and collectives, and sequence, tensor and pipeline parallelism."""
