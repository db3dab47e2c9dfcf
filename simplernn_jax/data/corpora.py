"""Corpora by source: the standard library, text, JSON, CSV, Parquet, a prepared dataset.

A mixture, such as ``a/:0.7,b.jsonl:0.3``, names several sources with weights.
"""

import codecs
import dataclasses
import glob
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

from simplernn_jax.config import DataConfig, PythonSource
from simplernn_jax.data.chat_template import load_template
from simplernn_jax.data.documents import PIECE_SIZE, Corpus, Piece, Record, cut_text, pieces_of
from simplernn_jax.data.prepared_dataset import PreparedDataset, find_prepared
from simplernn_jax.data.record_files import (
    ConversationFiles,
    CsvFiles,
    JsonFiles,
    ParquetFiles,
    suffix_of,
)
from simplernn_jax.data.source_files import SourceFile, find_files, stdlib_files
from simplernn_jax.errors import UserError


class TextFiles(Corpus):
    """Text files, each of them one document."""

    kind = "text"

    def _read(self, file: SourceFile) -> Iterator[tuple[str, Piece, int]]:
        for piece in pieces_of((text, True) for text in self._texts(file)):
            yield "", piece, len(piece.text)

    def _pieces(self, content: Piece) -> Iterable[Piece]:
        return [content]

    def _texts(self, file: SourceFile) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(self._config.encoding_errors)
        offset = 0
        rest = ""
        with self._opened(file) as stream:
            last = False
            while not last:
                block = stream.read(PIECE_SIZE)
                last = len(block) < PIECE_SIZE
                pending = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(block, final=last)
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{file.path}: invalid UTF-8 at byte {offset - pending + error.start}; "
                        "convert the file to UTF-8, or set config.data.encoding_errors=replace"
                    ) from error
                if offset == 0:
                    text = text.removeprefix("\ufeff")  # a byte order mark is not a text
                offset += len(block)
                text = rest + text
                stop = len(text) if last else text.rfind("\n") + 1 or len(text)
                if stop:
                    yield text[:stop]
                rest = text[stop:]


class PythonTexts(Corpus):
    """Texts of a `PythonSource`, each of them one document."""

    kind = "python"

    def records(self) -> Iterator[tuple[Record, int]]:
        """See `Corpus.records`."""
        self._begin()
        source: Any = self._config.source
        file = SourceFile(str(source), str(source))
        for number, text in enumerate(source.texts()):
            if not isinstance(text, str):
                found = type(text).__name__
                raise UserError(f"{file.name}[{number}]: of type {found}; give strings")
            self.bytes_read += len(text)
            yield (file, f"[{number}]", text), len(text)

    def _pieces(self, content: str) -> Iterable[Piece]:
        return pieces_of(cut_text(content))

    def fingerprint(self) -> str:
        """SHA-256 hex over the texts, which are measured on the way."""
        digest = hashlib.sha256()
        for (_, _, text), _ in self.records():
            digest.update(json.dumps(text).encode())
        self.total_bytes = self.bytes_read
        return digest.hexdigest()


_WEIGHTED = re.compile(r"(.+?):([+-]?(?:(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|nan|inf))(?:,|$)", re.I)
"""A source of a mixture and its weight."""
_READERS: dict[str, type[JsonFiles] | type[ParquetFiles] | type[TextFiles]] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), JsonFiles),
    **dict.fromkeys((".csv", ".tsv"), CsvFiles),
    ".parquet": ParquetFiles,
}


def open_corpus(config: DataConfig, exclude: Iterable[str] = ()) -> Corpus:
    """Find the documents of ``config.source``; nothing but file listings is read.

    A folder is searched recursively without hidden and binary files and without the workdirs of
    runs. Files come in sorted order, each a document; with a suffix of `_READERS`, each record or
    row is one (JSON and CSV next to text are text, too, if the field is the default one). All but
    Parquet with a further suffix ``.gz`` or ``.zst`` are decompressed while they are read.

    Args:
      config: the source and the format of its text.
      exclude: folders that the run writes to, left out below the source's folder or a glob's.

    Raises:
      UserError: the source is missing, empty, of several formats, or a folder that is one of
        `exclude`.
    """
    source = config.source
    if re.search("[\0\ud800-\udc7f\udd00-\udfff]", source):  # others are bytes of file names
        raise UserError(f"{source}: no path holds a NUL or half a surrogate pair; correct it")
    if split_mixture(source):
        raise UserError(f"{source}: a mixture, which only training takes; give one source")
    try:
        corpus = _open(config, exclude)
    except OSError as error:  # such as a folder that is not readable
        problem = f"{error.filename or source}: {error.strerror or error}"
        raise UserError(f"{problem}; correct it, or select the text with a glob") from error
    if config.template and not isinstance(corpus, ConversationFiles):
        raise UserError(f"{source}: {corpus.kind}; conversations (data.template) come as JSONL")
    return corpus


def _open(config: DataConfig, exclude: Iterable[str]) -> Corpus:
    source = config.source
    if isinstance(source, PythonSource):
        return PythonTexts([], config)
    if source == "stdlib":
        # The user cannot correct a file of a distribution.
        return TextFiles(stdlib_files(), dataclasses.replace(config, encoding_errors="replace"))
    if source.startswith("tfds:"):
        return PreparedDataset(find_prepared(source.removeprefix("tfds:")), config)
    files = find_files(source, frozenset(map(os.path.realpath, exclude)))
    suffixes = [suffix_of(file.path) for file in files]
    readers = [_READERS.get(suffix, TextFiles) for suffix in suffixes]
    if TextFiles in readers and config.field == DataConfig.field:  # such as the data of a program
        others = _READERS.keys() - {".json", ".csv", ".tsv"}
        readers = [_READERS[suffix] if suffix in others else TextFiles for suffix in suffixes]
    kinds = {reader.kind: file.name for reader, file in zip(readers, files, strict=True)}
    if len(kinds) > 1:
        found = " and ".join(f"{kind} ({name})" for kind, name in sorted(kinds.items()))
        raise UserError(f"{source}: both {found}; specify one kind with a glob such as '*.jsonl'")
    if readers[0] is JsonFiles and config.template:
        field = "messages" if config.field == DataConfig.field else config.field
        template = load_template(config.template)
        return ConversationFiles(files, dataclasses.replace(config, field=field, template=template))
    return readers[0](files, config)


def split_mixture(source: str) -> list[tuple[str, str]]:
    """Split ``data.source`` into sources and their weights; empty if it is a single source.

    A source goes up to ``:NUMBER`` before a comma or the end; other commas and colons belong to it.
    Any path that exists is a single source.

    Raises:
      UserError: a source has no weight.
    """
    if "," not in source or "\0" in source or os.path.lexists(os.path.expanduser(source)):
        return []
    entries = [(found[1], found[2]) for found in _WEIGHTED.finditer(source)]
    rest = _WEIGHTED.sub("", source)
    if entries and (rest or len(entries) < 2):
        raise _mixture_error(source, f"no weight for {rest or source}")
    return entries


def parse_mixture(source: str) -> list[tuple[str, float]] | None:
    """Return the sources of a mixture and their probabilities; None if it is a single source.

    Raises:
      UserError: a source has no weight, one is negative or not finite, or all are 0.
    """
    weights = [(name, float(weight)) for name, weight in split_mixture(source)]
    total = sum(weight for _, weight in weights)
    if any(not 0 <= weight < math.inf for _, weight in weights):
        raise _mixture_error(source, "a weight is negative or not finite")
    if weights and not 0 < total < math.inf:
        raise _mixture_error(source, f"the sum of the weights is {total}")
    return [(name, weight / total) for name, weight in weights] or None


def _mixture_error(source: str, problem: str) -> UserError:
    return UserError(
        f"config.data.source={source}: {problem}; give each source of a mixture a weight, such "
        "as 'a/:0.7,b.jsonl:0.3'"
    )


def absolute_source(source: str) -> str:
    """Make the paths of a source absolute; `UserError` if a prepared dataset is not found."""
    if source == "stdlib" or isinstance(source, PythonSource):
        return source
    if source.startswith("tfds:"):
        folder = find_prepared(source.removeprefix("tfds:"))
        return source if folder.is_absolute() else f"tfds:{folder.absolute()}"
    if mixture := split_mixture(source):
        return ",".join(f"{absolute_source(path)}:{weight}" for path, weight in mixture)
    path = os.path.expanduser(source)
    if os.path.exists(path) or not glob.has_magic(path):
        return os.path.abspath(path)
    return os.path.join(glob.escape(os.getcwd()), path)
