"""Regular files: read with a bound, replaced atomically, optionally checksummed.

Reading and writing never block, even if the path is a FIFO, a device, a link to one, or a file
that never ends.
"""

import contextlib
import errno
import hashlib
import importlib.util
import io
import os
import secrets
import stat
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import filelock
from absl import logging

from simplernn_jax.errors import UserError


def cache_folder(name: str) -> Path:
    """Return ``simplernn_jax/NAME`` in ``XDG_CACHE_HOME`` or ``~/.cache``; it may not exist."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    parent = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return parent / "simplernn_jax" / name


_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.ENXIO)
DAMAGE = (*_NO_FILE, errno.EIO, errno.EFBIG)
"""Errors from reading a file that is not as it was written; other ones are the machine's."""
SMALL_FILE = 1 << 26
"""Default bound on what `read_file` reads: 64 MiB."""


def check_damage(error: OSError) -> None:
    """Raise an error of the machine, which says nothing about the file."""
    if error.errno not in DAMAGE:
        raise error


def open_file(path: str | os.PathLike[str], *, follow_link: bool = True) -> io.BufferedReader:
    """Open a regular file for reading, as ``open(path, "rb")`` does.

    Raises:
      OSError: no such file, or it is a folder, a FIFO, a device or a socket; never blocks. Also a
        link if `follow_link` is False.
    """
    # Without O_NONBLOCK, opening a FIFO would wait for a writer.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_link else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_owner(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    """Check that only this user, or root, can have written a file or folder.

    Raises:
      OSError: it belongs to another user, or is group- or world-writable.
    """
    if status.st_uid not in (os.geteuid(), 0):
        raise OSError(errno.EPERM, "belongs to another user", os.fspath(path))
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(errno.EPERM, "is group- or world-writable", os.fspath(path))


def read_file(
    path: str | os.PathLike[str],
    limit: int = SMALL_FILE,
    *,
    follow_link: bool = True,
    only_own: bool = False,
) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
      OSError: it cannot be read, is not a regular file, or is larger (EFBIG),
        or is a link and `follow_link` is False, or `only_own` and `check_owner` rejects it.
    """
    with open_file(path, follow_link=follow_link) as file:
        status = os.fstat(file.fileno())
        if only_own:
            check_owner(status, path)
        # `read` allocates all that it may return: request little more than the file's size.
        size = status.st_size
        content = file.read(size + 1) if size <= limit else b""
        if size < len(content) <= limit:  # of a growing file, or one without a size
            content += file.read(limit + 1 - len(content))
    if max(size, len(content)) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit:,} bytes", os.fspath(path))
    return content


def sha256_hex(content: bytes | memoryview | str) -> str:
    """Return the SHA-256 of bytes, or of text in UTF-8, in hexadecimal."""
    data = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()


def check_output(path: str | os.PathLike[str]) -> None:
    """Check that writing to `path` replaces nothing but a regular file.

    Raises:
      OSError: it is something else, such as a folder or a device.
    """
    if os.path.isdir(path):
        raise OSError(errno.EISDIR, "a folder", os.fspath(path))
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))


def check_writable(path: str | os.PathLike[str]) -> None:
    """Check that `write_file` can write a file at `path`, before long work.

    Raises:
      OSError: as `check_output`, or its folder is missing or not writable.
    """
    check_output(path)
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise OSError(errno.ENOENT, "its folder does not exist", os.fspath(path))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, "its folder is not writable", os.fspath(path))


def write_file(
    path: str | os.PathLike[str], content: bytes, *, durable: bool = True, mode: int = 0o666
) -> None:
    """Replace the regular file at `path` by `content`, atomically.

    A link is followed: its target is replaced. Unless `durable` is False, the content then survives
    a power failure. `mode` has the permissions of the file before the umask.

    Raises:
      OSError: the disk is full or not writable, or `path` is not a regular file; the old content
        is unchanged.
    """
    check_output(path)
    path = os.path.realpath(path)
    # An unpredictable name and O_EXCL: an existing file or link is never opened.
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, f".{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        with os.fdopen(os.open(temporary, flags, mode), "wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
    if durable:
        sync(folder)


def sync(path: str | os.PathLike[str]) -> None:
    """Flush the content of a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_lock(lock: filelock.BaseFileLock, timeout: float = -1) -> None:
    """Acquire a lock; on a file system without locks, only warn.

    Raises:
      filelock.Timeout: another process has had it for `timeout` seconds.
    """
    try:
        lock.acquire(timeout=timeout)
    except (OSError, NotImplementedError) as error:
        without = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
        if isinstance(error, OSError) and error.errno not in without:
            raise
        logging.warning(
            "%s: this file system has no locks; let only one process write there", lock.lock_file
        )


def write_sealed(path: str | os.PathLike[str], body: str) -> None:
    """Replace the text file at `path` by `body` and a line with its SHA-256, as `write_file`.

    `body` ends in a newline or is empty.
    """
    write_file(path, f"{body}{sha256_hex(body)}\n".encode())


def read_sealed(path: str | os.PathLike[str], limit: int = SMALL_FILE) -> str | None:
    """Read the body that `write_sealed` wrote; None if the file is missing or was changed.

    A file of more than `limit` bytes counts as changed.

    Raises:
      OSError: the file may not be read, or the machine has no memory or file descriptor for it.
    """
    try:
        text = read_file(path, limit).decode("utf-8")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        check_damage(error)
        return None
    body = text[: max(len(text) - 65, 0)]
    return body if text == f"{body}{sha256_hex(body)}\n" else None


@contextlib.contextmanager
def importing(path: Path, flag: str, name: str) -> Iterator[ModuleType]:
    """Import a Python file as the module `name`, with its folder first on ``sys.path``.

    `flag` names it in errors.

    Raises:
      UserError: there is no such file, or its code or the body of the context raises.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"{flag}={path}: not a Python file; specify an existing one")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # imports work as in a script of that folder
    try:
        spec.loader.exec_module(module)
        yield module
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{flag}={path}: {_describe(error, path)}; fix the file") from error
    finally:
        sys.path.remove(folder)


def _describe(error: BaseException, path: Path) -> str:
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path.absolute()]
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}: {error}"


def page_template(name: str, filters: Mapping[str, Any] | None = None) -> Any:
    """Load the template of a page, by its path in the package; it begins from ``page.html``.

    It escapes all values, and raises for a missing one.
    """
    import jinja2  # here, since to import it takes a tenth of a second of every start

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("simplernn_jax", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(filters or {})
    return environment.get_template(name)
