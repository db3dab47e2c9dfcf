"""Corpora by source: the standard library, text, JSONL, Parquet, a prepared dataset."""

import os
from collections.abc import Iterable

from simplernn_jax.config import DataConfig
from simplernn_jax.data.chat_template import load_template
from simplernn_jax.data.documents import Corpus, Document
from simplernn_jax.data.file_search import find_files, stdlib_files
from simplernn_jax.data.mixture import parse_mixture
from simplernn_jax.data.prepared_dataset import PreparedDataset, find_prepared
from simplernn_jax.data.record_files import ConversationFiles, JsonlFiles, ParquetFiles, RecordFiles
from simplernn_jax.data.source_files import COMPRESSED_SUFFIXES
from simplernn_jax.data.text_files import TextFiles
from simplernn_jax.errors import UserError

__all__ = ["Corpus", "Document", "open_corpus"]


def open_corpus(config: DataConfig, exclude: Iterable[str] = ()) -> Corpus:
    """Find the documents of ``config.source``; nothing but file listings is read.

    A folder is searched recursively without hidden and binary files and without the workdirs of
    runs. Files come in sorted order, each a document; with the suffix ``.jsonl`` or ``.ndjson``,
    each record is one, and with ``.parquet`` each row. Text and JSONL with a further suffix
    ``.gz`` or ``.zst`` are decompressed while they are read.

    Args:
      config: the source and the format of its text.
      exclude: folders that the run writes to, left out below the source's folder or a glob's.

    Raises:
      UserError: the source is missing, empty, a mixture of JSONL, Parquet and text, or a folder
        that is one of `exclude`.
    """
    source = config.source
    if "\0" in source:
        raise UserError(f"{source}: no path holds a NUL character; correct the source")
    if parse_mixture(source) is not None:
        raise UserError(f"{source}: a mixture, which only training takes; give one source")
    try:
        return _open(config, frozenset(map(os.path.realpath, exclude)))
    except OSError as error:
        raise UserError(f"{source}: {_problem(error)}") from error


def _open(config: DataConfig, exclude: frozenset[str]) -> Corpus:
    source = config.source
    if config.template and (source == "stdlib" or source.startswith("tfds:")):
        raise UserError(f"{source}: no conversations (data.template), which come as JSONL")
    if source == "stdlib":
        return TextFiles(stdlib_files(), encoding_errors="strict")
    if source.startswith("tfds:"):
        folder = find_prepared(source.removeprefix("tfds:"))
        return PreparedDataset(folder, config.field, config.encoding_errors)
    files = find_files(source, exclude)
    if all(os.path.getsize(file.path) == 0 for file in files):
        raise UserError(f"{source}: empty; put text into it or choose another source")
    kinds = [_kind(file.path) for file in files]
    other = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), None)
    if other is not None:
        raise UserError(
            f"{source}: both {kinds[0]} ({files[0].name}) and {kinds[other]} "
            f"({files[other].name}); specify one kind with a glob such as '*.jsonl'"
        )
    if config.template:
        if kinds[0] != "JSONL":
            raise UserError(f"{source}: {kinds[0]}; conversations (data.template) come as JSONL")
        return ConversationFiles(
            files,
            "messages" if config.field == DataConfig.field else config.field,
            config.encoding_errors,
            config.max_bad_records,
            template=load_template(config.template),
            only_assistant=config.loss_on == "assistant",
        )
    if kinds[0] == "text":
        return TextFiles(files, config.encoding_errors)
    readers: dict[str, type[RecordFiles]] = {"JSONL": JsonlFiles, "Parquet": ParquetFiles}
    return readers[kinds[0]](files, config.field, config.encoding_errors, config.max_bad_records)


def _kind(path: str) -> str:
    name = path.lower()
    if name.endswith(".parquet"):
        return "Parquet"
    stem, suffix = os.path.splitext(name)
    if (stem if suffix in COMPRESSED_SUFFIXES else name).endswith((".jsonl", ".ndjson")):
        return "JSONL"
    return "text"


def _problem(error: OSError) -> str:
    try:
        os.getcwd()
    except OSError:
        return "the current folder was deleted; change to another one and run again"
    return f"{error.strerror or error}; correct the source"
