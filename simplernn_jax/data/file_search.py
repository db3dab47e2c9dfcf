"""The files that a source names: one file, a folder, a glob, or Python's own library.

Only regular files are found.
"""

import errno
import glob
import os
import re
import stat
import sysconfig
from pathlib import Path

from absl import logging

from simplernn_jax.data.source_files import SourceFile, open_source
from simplernn_jax.data.store_reader import META_FILE, is_store
from simplernn_jax.errors import UserError, counted, one_line

_STDLIB_LEFT_OUT = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
_BINARY_PROBE = 8192
"""Leading bytes in which a NUL marks a file as binary, as in git."""


def find_files(source: str, exclude: frozenset[str]) -> list[SourceFile]:
    """Find the files of a path or glob, sorted by name.

    Args:
      source: a regular file, a folder (searched without hidden and binary files and without
        workdirs of runs and token stores; links to folders are not followed), or a glob (folders
        that cannot be read match nothing, below ``**`` with a warning).
      exclude: real paths of folders that are left out below a folder or a glob's folder.

    Raises:
      UserError: nothing there, a folder in it cannot be read, or `source` is an excluded folder.
      OSError: the path cannot be followed.
    """
    path = os.path.expanduser(source)
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR) or glob.has_magic(path):
            return _glob_files(source, path, exclude)
        raise
    if stat.S_ISREG(mode):
        return [SourceFile(os.path.basename(path), path)]
    if not stat.S_ISDIR(mode):
        raise UserError(f"{source}: not a regular file; write the text to a file first")
    if os.path.realpath(path) in exclude:
        raise UserError(
            f"{source}: the run itself writes into this folder; choose another --workdir and "
            "--config.data.cache_dir, or specify the text with a glob such as '*.txt'"
        )
    files = _folder_files(path, exclude)
    if not files:
        raise UserError(f"{source}: no text file in this folder; put some there")
    return files


def stdlib_files() -> list[SourceFile]:
    """Find the running Python's own modules, without tests and packages; `UserError` if none."""
    root = sysconfig.get_path("stdlib")
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _STDLIB_LEFT_OUT]
        for name in names:
            path = os.path.join(folder, name)
            if name.endswith(".py") and os.path.isfile(path):
                files.append(SourceFile(os.path.relpath(path, root), path))
    if not files:
        raise UserError(
            f"stdlib: no Python source in {root}; use your own text with --config.data.source=PATH"
        )
    return sorted(files, key=lambda file: file.name)


def _glob_files(source: str, path: str, exclude: frozenset[str]) -> list[SourceFile]:
    top = glob_folder(path)
    # Of several paths to a folder, through links, the first is taken.
    distinct = {
        (os.path.realpath(os.path.dirname(match)), os.path.basename(match)): match
        for match in sorted(matching_files(path), reverse=True)
    }
    found = sorted(match for match in distinct.values() if not _is_excluded(match, top, exclude))
    if not found:
        what = "no file matches this glob" if glob.has_magic(path) else "no such file or folder"
        shown = one_line(source, 200)  # so that what is wrong with it is not left out
        raise UserError(f"{shown}: {what} (looked from {os.getcwd()}); {_advice(source)}")
    if len(found) == 1:
        return [SourceFile(os.path.basename(found[0]), found[0])]
    root = os.path.commonpath(found)
    return [SourceFile(os.path.relpath(match, root), match) for match in found]


def _advice(source: str) -> str:
    if source.startswith("hf://") or re.fullmatch(r"[\w-]+/[\w.-]+", source):
        hint = "a dataset of the Hugging Face hub is downloaded first, with hf download --repo-type"
        return f"correct the source; {hint} dataset USER/NAME --local-dir FOLDER"
    if "://" in source:
        return "download the file first, for example with curl -LO, and give its path"
    if source.endswith(" from Python>"):  # as a checkpoint has it
        return "set data.source to these texts in Python"
    return "correct the source"


def glob_folder(pattern: str) -> str:
    """Folder that a glob searches: all before its first magic character."""
    folder = os.path.dirname(pattern)
    while glob.has_magic(folder):
        folder = os.path.dirname(folder)
    return os.path.realpath(folder)


def _is_excluded(path: str, top: str, exclude: frozenset[str]) -> bool:
    """Return whether `path` is in an excluded folder that is itself below `top`."""
    folder = os.path.dirname(os.path.realpath(path))
    return any(
        os.path.commonpath([folder, left_out]) == left_out
        and os.path.commonpath([left_out, top]) == top != left_out
        for left_out in exclude
    )


def _folder_files(root: str, exclude: frozenset[str]) -> list[SourceFile]:
    files: list[SourceFile] = []
    binary: list[str] = []
    links: list[str] = []
    for folder, subfolders, names in os.walk(root, onerror=_reject_unreadable):
        is_workdir = "checkpoints" in subfolders and "metrics.jsonl" in names
        if folder != root and (is_workdir or (META_FILE in names and is_store(Path(folder)))):
            what = "the workdir of a run" if is_workdir else "tokens of a run"
            logging.info("%s: left out, %s", folder, what)
            subfolders.clear()
            continue
        if not os.access(folder, os.X_OK):  # names can be listed, but no file opened
            _reject_unreadable(PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder))
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".")
            and os.path.realpath(os.path.join(folder, name)) not in exclude
        ]
        links += [path for name in subfolders if os.path.islink(path := os.path.join(folder, name))]
        for name in names:
            path = os.path.join(folder, name)
            if name.startswith(".") or not os.path.isfile(path):
                continue
            if _is_binary(path):
                binary.append(path)
            else:
                files.append(SourceFile(os.path.relpath(path, root), path))
    for paths, what in ((binary, "binary file"), (links, "linked folder")):
        if paths:
            first = one_line(os.path.relpath(min(paths), root))
            number = counted(len(paths), what)
            logging.warning("%s: %s left out, such as %s", root, number, first)
    return sorted(files, key=lambda file: file.name)


def _reject_unreadable(error: OSError) -> None:
    raise UserError(
        f"{error.filename}: {error.strerror}; make this folder readable, or select the text with "
        "a glob"
    ) from error


def _is_binary(path: str) -> bool:
    if path.lower().endswith(".parquet"):
        return False
    with open_source(path) as (stream, _):
        return b"\0" in stream.read(_BINARY_PROBE)


def matching_files(pattern: str) -> set[str]:
    """Find the regular files of a glob, in which ``**`` does not follow links to folders.

    ``glob.glob`` follows a link to a parent folder again and again, 40 times with one such link,
    and 2 to the power of 40 times with two.
    """
    recursive = re.search(r"(^|/)\*\*(?=/|$)", pattern)
    found: set[str] = set()
    try:
        if not recursive:
            return set(filter(os.path.isfile, glob.glob(pattern)))
        top, rest = pattern[: recursive.end(1)], pattern[recursive.end() :] or "/*"
        for path in glob.glob(top) if top else ["."]:
            for folder, subfolders, _ in os.walk(path, onerror=_warn_of_unreadable):
                subfolders[:] = [name for name in subfolders if not name.startswith(".")]
                found |= matching_files(glob.escape(folder.rstrip("/")) + rest)
    except ValueError:  # no file has such a name
        return set()
    return found


def _warn_of_unreadable(error: OSError) -> None:
    logging.warning("%s: left out: %s", one_line(error.filename), error.strerror)
