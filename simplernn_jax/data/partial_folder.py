"""A folder that is written under a temporary name, by one process at a time, across kills."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import logging

from simplernn_jax.files import sync

_SUFFIX = ".tmp"
_NAME = re.compile(rf"\.[0-9a-f]{{32}}{re.escape(_SUFFIX)}")
_LOCK = "lock"
_RESULT = "result"
_ABANDONED_SECONDS = 7 * 24 * 3600
_POLL_SECONDS = 0.1
_FASTER = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)


class Interrupted(Exception):
    """Base of errors after which the work that was done stays for the next call."""


@contextlib.contextmanager
def partial_folder(
    folder: Path, is_whole: Callable[[], bool]
) -> Iterator[tuple[Path, Path] | None]:
    """Yield a folder for intermediate files and one in it that becomes `folder` on leaving.

    Both hold what an earlier process left that was killed or interrupted. An exception, other than
    `Interrupted` and those that end a process, removes them. Another process with the same
    `folder` is waited for. Then `is_whole` is asked, under the lock, whether `folder` is there,
    having removed it if it is corrupted; None is yielded if so.

    Raises:
      OSError: the disk is full or not writable.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(folder)
    _remove_abandoned(folder.parent, but=temporary)
    with _locked(temporary):
        if is_whole():
            shutil.rmtree(temporary, ignore_errors=True)
            yield None
            return
        result = temporary / _RESULT
        try:
            result.mkdir(exist_ok=True)
            yield temporary, result
            for path in [*result.iterdir(), result]:
                sync(path)
            os.rename(result, folder)
            sync(folder.parent)
        except Interrupted:
            raise
        except OSError as error:
            # Without file locks, another process can have been faster, and removed `temporary`.
            shutil.rmtree(temporary, ignore_errors=True)
            if error.errno not in _FASTER or not os.path.lexists(folder):
                raise
        except Exception:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        shutil.rmtree(temporary, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """Remove what a process left that was killed after `folder` had its name."""
    shutil.rmtree(_temporary(folder), ignore_errors=True)


def _temporary(folder: Path) -> Path:
    return folder.parent / f".{folder.name}{_SUFFIX}"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Create `folder` and hold the lock in it, which ends with the process."""
    has_waited = False
    while True:
        folder.mkdir(exist_ok=True)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
            lock = os.open(folder / _LOCK, flags, 0o644)
        except FileNotFoundError:
            continue  # its owner has just removed the folder
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            if not has_waited:
                logging.info("waiting for another process that writes %s", folder)
            has_waited = True
            time.sleep(_POLL_SECONDS)
            continue
        except OSError:
            logging.info("no file locks on this file system: %s", folder)
        try:
            if _is_file(lock, folder / _LOCK):
                yield
                return
        finally:
            os.close(lock)


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _remove_abandoned(parent: Path, but: Path) -> None:
    """Remove what killed writers left, other than `but`, and nobody continued for a week."""
    limit = time.time() - _ABANDONED_SECONDS
    # Users may have hidden folders of their own there: only those of stores have such a name.
    found = {path for path in parent.glob(f".*{_SUFFIX}") if _NAME.fullmatch(path.name)}
    for temporary in found - {but}:
        with contextlib.suppress(OSError):  # gone meanwhile, or not a writer's
            is_writers = (temporary / _LOCK).is_file()
            paths = [temporary, *temporary.iterdir()]
            if is_writers and all(path.stat().st_mtime < limit for path in paths):
                shutil.rmtree(temporary, ignore_errors=True)
