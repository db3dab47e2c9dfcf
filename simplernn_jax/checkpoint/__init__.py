"""Checkpoints: saved, verified, chosen, restored and removed."""
