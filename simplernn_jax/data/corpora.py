"""Where documents come from: the standard library, text files, JSONL, a prepared data set."""

import glob
import os
import sysconfig
from collections.abc import Iterable

from absl import logging

from simplernn_jax.config import DataConfig
from simplernn_jax.data.documents import Corpus, Document
from simplernn_jax.data.jsonl_files import JsonlFiles
from simplernn_jax.data.prepared_dataset import PreparedDataset, find_prepared
from simplernn_jax.data.text_files import SourceFile, TextFiles, open_source
from simplernn_jax.errors import UserError

__all__ = ["Corpus", "Document", "open_corpus"]

_JSONL_SUFFIXES = (".jsonl", ".ndjson")
_STDLIB_LEFT_OUT = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
_BINARY_PROBE = 8192
"""Leading bytes in which a NUL marks a file as binary, as git does."""


def open_corpus(config: DataConfig, exclude: Iterable[str] = ()) -> Corpus:
    """Finds the documents that ``config.source`` names; nothing but file listings is read.

    A folder is searched recursively without hidden and binary files and without the workdirs of
    runs. Files in sorted order, each a document; with the suffix ``.jsonl`` or
    ``.ndjson``, each record is one.

    Args:
      config: says what to read.
      exclude: folders that are written to. Below the source's folder, or a glob's, they are left
        out: what a run writes is no text of its source.

    Raises:
      UserError: nothing there, nothing in it, a mixture of JSONL and text, or a folder that is
        one of `exclude`.
    """
    source = config.source
    if source == "stdlib":
        return TextFiles(_stdlib_files(), encoding_errors="strict")
    if source.startswith("tfds:"):
        folder = find_prepared(source.removeprefix("tfds:"))
        return PreparedDataset(folder, config.field, config.encoding_errors)
    files = _find_files(source, frozenset(map(os.path.realpath, exclude)))
    if all(os.path.getsize(file.path) == 0 for file in files):
        raise UserError(f"{source}: empty; put text into it or choose another source")
    jsonl = [file.path.lower().endswith(_JSONL_SUFFIXES) for file in files]
    if all(jsonl):
        return JsonlFiles(files, config.field, config.encoding_errors, config.max_bad_records)
    if any(jsonl):
        raise UserError(
            f"{source}: both JSONL ({files[jsonl.index(True)].name}) and other files "
            f"({files[jsonl.index(False)].name}); name one kind with a glob such as '*.jsonl'"
        )
    return TextFiles(files, config.encoding_errors)


def _find_files(source: str, exclude: frozenset[str]) -> list[SourceFile]:
    path = os.path.expanduser(source)
    if os.path.isfile(path):
        return [SourceFile(os.path.basename(path), path)]
    if os.path.isdir(path):
        if os.path.realpath(path) in exclude:
            raise UserError(
                f"{source}: the run itself writes into this folder; choose another --workdir and "
                "--config.data.cache_dir, or name the text with a glob such as '*.txt'"
            )
        files = _folder_files(path, exclude)
        if not files:
            raise UserError(f"{source}: no text file in this folder; put some there")
        return files
    if os.path.exists(path):
        raise UserError(f"{source}: not a regular file; write the text to a file first")
    top = _glob_folder(path)
    found = sorted(
        match
        for match in glob.glob(path, recursive=True)
        if os.path.isfile(match) and not _is_excluded(match, top, exclude)
    )
    if not found:
        what = "no file matches this glob" if glob.has_magic(path) else "no such file or folder"
        raise UserError(f"{source}: {what} (looked from {os.getcwd()}); correct the source")
    if len(found) == 1:
        return [SourceFile(os.path.basename(found[0]), found[0])]
    root = os.path.commonpath(found)
    return [SourceFile(os.path.relpath(match, root), match) for match in found]


def _glob_folder(pattern: str) -> str:
    """The folder that a glob searches: all before its first magic character."""
    folder = os.path.dirname(pattern)
    while glob.has_magic(folder):
        folder = os.path.dirname(folder)
    return os.path.realpath(folder)


def _is_excluded(path: str, top: str, exclude: frozenset[str]) -> bool:
    """Whether `path` lies in an excluded folder that itself lies below `top`."""
    folder = os.path.dirname(os.path.realpath(path))
    return any(
        os.path.commonpath([folder, left_out]) == left_out
        and os.path.commonpath([left_out, top]) == top != left_out
        for left_out in exclude
    )


def _folder_files(root: str, exclude: frozenset[str]) -> list[SourceFile]:
    files: list[SourceFile] = []
    binary: list[SourceFile] = []
    for folder, subfolders, names in os.walk(root):
        if folder != root and "checkpoints" in subfolders and "metrics.jsonl" in names:
            logging.info("%s: left out, the workdir of a run", folder)
            subfolders.clear()
            continue
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".")
            and os.path.realpath(os.path.join(folder, name)) not in exclude
        ]
        for name in names:
            path = os.path.join(folder, name)
            if name.startswith(".") or not os.path.isfile(path):
                continue
            file = SourceFile(os.path.relpath(path, root), path)
            (binary if _is_binary(path) else files).append(file)
    if binary:
        logging.warning(
            "%s: %d binary files left out, the first of them %s",
            root,
            len(binary),
            min(file.name for file in binary),
        )
    return sorted(files, key=lambda file: file.name)


def _is_binary(path: str) -> bool:
    with open_source(path) as stream:
        return b"\0" in stream.read(_BINARY_PROBE)


def _stdlib_files() -> list[SourceFile]:
    """The running Python's own modules, without tests and installed packages."""
    root = sysconfig.get_path("stdlib")
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _STDLIB_LEFT_OUT]
        for name in names:
            path = os.path.join(folder, name)
            if name.endswith(".py") and _is_utf8(path):
                files.append(SourceFile(os.path.relpath(path, root), path))
    if not files:
        raise UserError(
            f"stdlib: no Python source in {root}; give your own text with --config.data.source=PATH"
        )
    return sorted(files, key=lambda file: file.name)


def _is_utf8(path: str) -> bool:
    try:
        with open(path, encoding="utf-8") as stream:
            stream.read()
    except (OSError, UnicodeDecodeError):
        return False
    return True
