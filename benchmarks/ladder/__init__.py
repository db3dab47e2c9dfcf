"""Rungs of growing size: our configurations and peers, held-out loss against training time."""
