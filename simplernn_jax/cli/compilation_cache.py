"""JAX's persistent compilation cache in the user's cache folder, with a checksum for every entry.

JAX does not always notice a corrupted entry, and never replaces one: of 240 entries with a flipped
bit, 10 gave wrong results and 20 crashed the process. So every entry is sealed with its SHA-256,
and a process deletes entries that do not match theirs, or that another user can have written,
before JAX loads any.
"""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import filelock
import jax
from absl import logging

from simplernn_jax.files import cache_folder, check_owner, read_file, sha256_hex, write_file

MAX_BYTES = 256 * 2**20
"""Size limit of all entries, unless ``JAX_COMPILATION_CACHE_MAX_SIZE`` sets another bound."""

_SUFFIXES = _ENTRY, _TIME, _SEAL = "-cache", "-atime", "-sha256"
"""Of the files of an entry: JAX's content and time of use, and our checksum."""
_COMPILED = "/jax/core/compile/backend_compile_duration"
"""Event of JAX, sent for every program once it was compiled and stored, or loaded."""


def use_compilation_cache() -> None:
    """Load the programs that earlier processes compiled, and store the ones of this process.

    They are in ``simplernn_jax/compiled`` of ``XDG_CACHE_HOME`` or ``~/.cache``; if it cannot be
    written, a warning says so and nothing is cached. A folder in ``JAX_COMPILATION_CACHE_DIR`` is
    left to JAX, unverified. ``JAX_ENABLE_COMPILATION_CACHE=false`` switches caching off.
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
        delete_invalid_entries(folder)
    except (OSError, RuntimeError) as error:
        jax.config.update("jax_enable_compilation_cache", False)
        reason = getattr(error, "strerror", None) or error
        logging.warning("compiled programs are not cached: %s", reason)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if settings["jax_compilation_cache_max_size"] < 0:
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    # XLA's further caches would be stored here without checksums and without a bound.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")

    def seal(event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILED:
            with contextlib.suppress(OSError):  # then the program is compiled again
                seal_entries(folder)

    jax.monitoring.register_event_duration_secs_listener(seal)


def delete_invalid_entries(folder: Path) -> None:
    """Delete entries that do not match their seals, and what remains of entries that are gone."""
    with _lock(folder):
        for key in {path.name.rpartition("-")[0] for path in folder.glob("*-*")}:
            entry, time_of_use, seal = (folder / f"{key}{suffix}" for suffix in _SUFFIXES)
            if not (time_of_use.is_file() and _is_sealed(entry, seal)):
                for path in (entry, time_of_use, seal):
                    path.unlink(missing_ok=True)


def seal_entries(folder: Path) -> None:
    """Seal all new entries; one without its time of use was not written to its end."""
    with _lock(folder):
        names = set(os.listdir(folder))
        for name in names:
            key = name.removesuffix(_ENTRY)
            if key == name or f"{key}{_SEAL}" in names or f"{key}{_TIME}" not in names:
                continue
            entry = folder / name
            if entry.is_symlink():
                continue
            with contextlib.suppress(OSError):  # of another user, for example
                entry.chmod(0o600)
                write_file(folder / f"{key}{_SEAL}", _checksum(entry), durable=False, mode=0o600)


def _lock(folder: Path) -> filelock.BaseFileLock:
    """Return the lock that JAX holds while it writes and deletes entries."""
    return filelock.FileLock(folder / ".lockfile", timeout=10)


def _is_sealed(entry: Path, seal: Path) -> bool:
    """Return whether an entry matches its seal, and only this user can have written both."""
    try:
        return read_file(seal, 64, only_own=True) == _checksum(entry)
    except OSError:
        return False


def _checksum(entry: Path) -> bytes:
    content = read_file(entry, MAX_BYTES, only_own=True)
    return sha256_hex(entry.name.encode() + content).encode()
