"""JAX's persistent compilation cache, in a folder that only this user can write."""

import os
import tempfile

import jax
from absl import logging

from simplernn_jax.files import cache_folder, check_owner

MAX_BYTES = 256 * 2**20
"""Size limit of all entries, unless ``JAX_COMPILATION_CACHE_MAX_SIZE`` sets another bound."""


def use_compilation_cache() -> None:
    """Load the programs that earlier processes compiled, and store the ones of this process.

    They are in ``simplernn_jax/compiled`` of ``XDG_CACHE_HOME`` or ``~/.cache``; if it cannot be
    written, a warning says so and nothing is cached. A folder in ``JAX_COMPILATION_CACHE_DIR`` is
    left to JAX. ``JAX_ENABLE_COMPILATION_CACHE=false`` switches caching off.
    """
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    settings = jax.config.values
    if settings["jax_compilation_cache_dir"] or not settings["jax_enable_compilation_cache"]:
        return
    try:
        folder = cache_folder("compiled")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds what will be executed
        check_owner(os.stat(folder), folder)
        tempfile.TemporaryFile(dir=folder).close()
        for entry in folder.glob("*-cache"):  # JAX writes the time of use last, and needs it
            if not entry.with_name(entry.name.removesuffix("cache") + "atime").exists():
                entry.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        jax.config.update("jax_enable_compilation_cache", False)
        reason = getattr(error, "strerror", None) or error
        logging.warning("compiled programs are not cached: %s", reason)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if settings["jax_compilation_cache_max_size"] < 0:
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    # XLA's further caches would be stored here without a bound.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
