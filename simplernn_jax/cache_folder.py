"""Folder of this user's caches: files that can be rebuilt, which takes time."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return ``simplernn_jax/NAME`` in ``XDG_CACHE_HOME`` or ``~/.cache``; it may not exist."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    parent = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return parent / "simplernn_jax" / name
