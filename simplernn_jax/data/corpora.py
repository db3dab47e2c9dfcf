"""Where documents come from: the standard library, text files, JSONL, a prepared data set."""

import os
from collections.abc import Iterable

from simplernn_jax.config import DataConfig
from simplernn_jax.data.documents import Corpus, Document
from simplernn_jax.data.file_search import find_files, stdlib_files
from simplernn_jax.data.jsonl_files import JsonlFiles
from simplernn_jax.data.prepared_dataset import PreparedDataset, find_prepared
from simplernn_jax.data.text_files import TextFiles
from simplernn_jax.errors import UserError

__all__ = ["Corpus", "Document", "open_corpus"]

_JSONL_SUFFIXES = (".jsonl", ".ndjson")


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
    try:
        return _open(config, frozenset(map(os.path.realpath, exclude)))
    except OSError as error:
        raise UserError(f"{source}: {_problem(error)}") from error


def _open(config: DataConfig, exclude: frozenset[str]) -> Corpus:
    source = config.source
    if source == "stdlib":
        return TextFiles(stdlib_files(), encoding_errors="strict")
    if source.startswith("tfds:"):
        folder = find_prepared(source.removeprefix("tfds:"))
        return PreparedDataset(folder, config.field, config.encoding_errors)
    files = find_files(source, exclude)
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


def _problem(error: OSError) -> str:
    try:
        os.getcwd()
    except OSError:
        return "the current folder was deleted; change to another one and run again"
    return f"{error.strerror or error}; correct the source"
