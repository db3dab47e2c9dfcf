"""A folder that appears whole or not at all."""

import contextlib
import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from simplernn_jax.files import sync

_SUFFIX = ".tmp"
_ABANDONED_SECONDS = 3600


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `folder`; on leaving, it is synced and renamed to it.

    When the block raises, the temporary folder is removed; when the process is killed, it is left
    behind under another name and removed by a later call. When another process was faster,
    its folder stays and ours is dropped.

    Raises:
      OSError: the disk is full or not writable.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}{_SUFFIX}"
    temporary.mkdir()
    try:
        yield temporary
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        try:
            os.rename(temporary, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    """Removes what killed writers left; a living one has written something within the hour."""
    limit = time.time() - _ABANDONED_SECONDS
    for temporary in parent.glob(f".*{_SUFFIX}"):
        with contextlib.suppress(OSError):  # gone meanwhile, or not a writer's
            if all(path.stat().st_mtime < limit for path in [temporary, *temporary.iterdir()]):
                shutil.rmtree(temporary, ignore_errors=True)
