"""Compiled programs, kept from one process to the next in the user's cache folder.

JAX decides what is kept under which key (program, compiler, options, processor or card); how it
lies on disk is settled here, because JAX's own files (jax 0.10 and 0.12) are not safe enough for
runs that must end in the same bytes: a damaged entry is never replaced, and where the package
zstandard is installed it is not noticed and can crash the process; an entry is not written at one
stroke; and their size has no bound without another package. Here every entry has its SHA-256
beside it and is used only if it agrees, and the entries used longest ago are deleted.
"""

import contextlib
import glob
import hashlib
import os
import secrets
import tempfile
from pathlib import Path

import jax
from absl import logging
from jax._src import compilation_cache

from simplernn_jax.cache_folder import cache_folder
from simplernn_jax.files import read_file

MAX_BYTES = 256 * 2**20
"""Room for all entries, unless ``JAX_COMPILATION_CACHE_MAX_SIZE`` sets another bound."""

_ENTRY = "-cache"  # in JAX's own format: other programs may share a folder of the user's choice
_SEAL = "-sha256"


def use_compilation_cache() -> None:
    """Makes this process load what an earlier one has compiled, and keep what it compiles.

    The folder is ``JAX_COMPILATION_CACHE_DIR`` if that is set, else ``simplernn_jax/compiled`` in
    ``XDG_CACHE_HOME`` or ``~/.cache``. If it cannot be written, a warning says so and nothing is
    kept. ``JAX_ENABLE_COMPILATION_CACHE=false`` switches it off.
    """
    chosen = jax.config.values["jax_compilation_cache_dir"]
    if not jax.config.values["jax_enable_compilation_cache"] or "://" in (chosen or ""):
        return  # off, or in a bucket, where JAX's own files are the better ones
    try:
        folder = Path(chosen or cache_folder("compiled")).absolute()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds what will be executed
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:
        jax.config.update("jax_enable_compilation_cache", False)
        reason = getattr(error, "strerror", None) or error
        logging.warning("compiled programs are not kept: %s: %s", chosen or "~/.cache", reason)
        return
    limit = jax.config.values["jax_compilation_cache_max_size"]
    cache = SealedFolder(folder, MAX_BYTES if limit < 0 else limit)
    compilation_cache.get_file_cache = lambda path: (cache, path)  # type: ignore[assignment, return-value]
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # XLA's further caches would lie here unsealed and without a bound.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


class SealedFolder:
    """Entries by key, each with its SHA-256; what JAX calls a cache.

    Processes may share it: at worst one compiles what another was about to write.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._path = folder  # JAX reads this name
        self._max_bytes = max_bytes
        self._failed = False

    def get(self, key: str) -> bytes | None:
        """What `put` was given, or None if it is not there or was changed."""
        seal = self._path / f"{key}{_SEAL}"
        try:
            value = read_file(self._path / f"{key}{_ENTRY}", self._max_bytes)
            if read_file(seal, len(_digest(b""))) != _digest(value):
                return None
        except OSError:
            return None
        with contextlib.suppress(OSError):
            os.utime(seal)  # used now: see `_shrink`
        return value

    def put(self, key: str, value: bytes) -> None:
        """Keeps `value` if there is room; the first failure of the disk is a warning, the others
        are silent.
        """
        if len(value) > self._max_bytes:
            return
        try:
            # The seal first: every entry has one to be found by, and alone it opens nothing.
            self._replace(key, _SEAL, _digest(value))
            self._replace(key, _ENTRY, value)
            self._shrink()
        except OSError as error:
            if not self._failed:
                logging.warning("not all is kept: %s: %s", self._path, error.strerror)
            self._failed = True

    def _replace(self, key: str, suffix: str, content: bytes) -> None:
        temporary = self._path / f"{key}-{secrets.token_hex(8)}.tmp"
        try:
            with open(temporary, "xb") as file:  # x: what others have put there is not opened
                file.write(content)
            os.replace(temporary, self._path / f"{key}{suffix}")
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def _shrink(self) -> None:
        """Deletes the entries used longest ago until the rest fits."""
        used: dict[str, float] = {}
        for seal in self._path.glob(f"*{_SEAL}"):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                used[seal.name.removesuffix(_SEAL)] = seal.stat().st_mtime
        left = self._max_bytes
        for key in sorted(used, key=lambda key: used[key], reverse=True):
            with contextlib.suppress(FileNotFoundError):
                left -= (self._path / f"{key}{_ENTRY}").stat().st_size
            if left < 0:
                for file in self._path.glob(f"{glob.escape(key)}-*"):
                    file.unlink(missing_ok=True)


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).hexdigest().encode()
