"""JAX's persistent compilation cache, with a checksum for every entry and a bound on their size.

JAX chooses keys and entries (program, compiler, options, processor or card). Its own files (jax
0.10.2 and 0.12.0) are not safe enough for bit-exact runs. Of 240 entries with one flipped bit, 10
gave wrong results and 20 crashed the process if the package zstandard is installed; a corrupted
entry is never replaced, one that was swapped for another is executed, and a bound on their size
needs another package. Here an entry is loaded only if it matches its SHA-256 and no other user can
have written it, and the least recently used ones are deleted.
"""

import contextlib
import os
import tempfile
from pathlib import Path

import jax
from absl import logging
from jax._src import compilation_cache

from simplernn_jax.files import cache_folder, read_file, sha256_hex, write_file

MAX_BYTES = 256 * 2**20
"""Size limit of all entries, unless ``JAX_COMPILATION_CACHE_MAX_SIZE`` sets another bound."""

_ENTRY = "-cache"  # in JAX's own format: other programs may share a folder of the user's choice
_CHECKSUM = "-sha256"


def use_compilation_cache() -> None:
    """Load the programs that earlier processes compiled, and store those of this one.

    The folder is ``JAX_COMPILATION_CACHE_DIR`` if that is set, else ``simplernn_jax/compiled`` in
    ``XDG_CACHE_HOME`` or ``~/.cache``. If it cannot be written, a warning says so and nothing is
    cached. ``JAX_ENABLE_COMPILATION_CACHE=false`` switches it off.
    """
    chosen = jax.config.values["jax_compilation_cache_dir"]
    if not jax.config.values["jax_enable_compilation_cache"] or "://" in (chosen or ""):
        return  # off, or in a bucket, which JAX's own cache supports
    try:
        folder = Path(chosen or cache_folder("compiled")).absolute()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds what will be executed
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:
        jax.config.update("jax_enable_compilation_cache", False)
        reason = getattr(error, "strerror", None) or error
        logging.warning("compiled programs are not cached: %s: %s", chosen or "~/.cache", reason)
        return
    limit = jax.config.values["jax_compilation_cache_max_size"]
    cache = ChecksummedCache(folder, MAX_BYTES if limit < 0 else limit)
    compilation_cache.get_file_cache = lambda path: (cache, path)  # type: ignore[assignment, return-value]
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # XLA's further caches would be stored here without checksums and without a bound.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


class ChecksummedCache:
    """Entries by key, each with its SHA-256, with the interface of JAX's caches.

    Processes may share it: at worst one compiles what another was about to write.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._path = folder  # JAX reads this name
        self._max_bytes = max_bytes
        self._found = max_bytes  # bytes that `_shrink` left; unknown before its first call
        self._put = 0  # bytes since then
        self._failed = False

    def get(self, key: str) -> bytes | None:
        """Return the value that was put, or None if it is missing, was changed, or is not ours."""
        checksum = self._path / f"{key}{_CHECKSUM}"
        try:
            value = read_file(self._path / f"{key}{_ENTRY}", self._max_bytes, only_own=True)
            if read_file(checksum, 64, only_own=True) != _checksum(key, value):
                return None
        except OSError:
            return None
        with contextlib.suppress(OSError):
            os.utime(checksum)  # used now: see `_shrink`
        return value

    def put(self, key: str, value: bytes) -> None:
        """Store `value` if it fits; only the first file-system error is a warning."""
        if len(value) > self._max_bytes:
            return
        try:
            # The checksum first: `_shrink` finds entries by it, and alone it loads nothing.
            for suffix, content in ((_CHECKSUM, _checksum(key, value)), (_ENTRY, value)):
                path = self._path / f"{key}{suffix}"
                path.unlink(missing_ok=True)  # it may be corrupted, or not a regular file
                write_file(path, content, durable=False, mode=0o600)
            self._put += len(value)
            # To read a folder of many entries takes longer than to write one. The bytes that other
            # processes put are unknown until then.
            if self._found + self._put > self._max_bytes or self._put > self._max_bytes // 16:
                self._shrink()
        except OSError as error:
            if not self._failed:
                logging.warning("some programs are not cached: %s: %s", self._path, error.strerror)
            self._failed = True

    def _shrink(self) -> None:
        """If the entries do not fit, delete the least recently used until a sixteenth is free."""
        sizes: dict[str, int] = {}
        used: dict[str, float] = {}
        for checksum in self._path.glob(f"*{_CHECKSUM}"):
            key = checksum.name.removesuffix(_CHECKSUM)
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                used[key] = checksum.stat().st_mtime
                sizes[key] = 0  # if it has no entry
                sizes[key] = (self._path / f"{key}{_ENTRY}").stat().st_size
        self._found, self._put = sum(sizes.values()), 0
        if self._found <= self._max_bytes:
            return
        for key in sorted(used, key=lambda key: used[key])[:-1]:  # the newest fits alone
            if self._found <= self._max_bytes - self._max_bytes // 16:
                break
            with contextlib.suppress(PermissionError):  # of another user
                for suffix in (_ENTRY, _CHECKSUM):
                    (self._path / f"{key}{suffix}").unlink(missing_ok=True)
                self._found -= sizes[key]


def _checksum(key: str, value: bytes) -> bytes:
    return sha256_hex(key.encode() + value).encode()
