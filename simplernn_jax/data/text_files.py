"""Texts as a corpus: files, read piece by piece, or strings from Python; each is a document."""

import codecs
import hashlib
import json
from collections.abc import Iterator

from simplernn_jax.data.documents import PIECE_SIZE, Corpus, Document, Piece, text_pieces
from simplernn_jax.data.source_files import SourceFile, open_source
from simplernn_jax.errors import UserError


class TextFiles(Corpus):
    """Text files, each of them one document."""

    kind = "text"

    def documents(self) -> Iterator[Document]:
        """See `Corpus.documents`."""
        self._begin()
        for file in self._files:
            yield Document(file.name, self._pieces(file))

    def _pieces(self, source: SourceFile) -> Iterator[Piece]:
        decoder = codecs.getincrementaldecoder("utf-8")(self._encoding_errors)
        before = self.bytes_read
        offset = 0
        rest = ""
        with open_source(source.path, self._encoding_errors) as (stream, file):
            last = False
            while not last:
                block = stream.read(PIECE_SIZE)
                last = len(block) < PIECE_SIZE
                pending = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(block, final=last)
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{source.path}: invalid UTF-8 at byte {offset - pending + error.start}; "
                        "convert the file to UTF-8, or run with encoding_errors=replace "
                        "(train.py: --config.data.encoding_errors=replace)"
                    ) from error
                if offset == 0:
                    text = text.removeprefix("\ufeff")  # a byte order mark is not a text
                offset += len(block)
                self._check_expansion(source, offset)
                self.bytes_read = before + file.tell()
                text = rest + text
                stop = len(text) if last else text.rfind("\n") + 1 or len(text)
                if stop:
                    yield Piece(text[:stop])
                rest = text[stop:]


class PythonTexts(Corpus):
    """Texts of a `PythonSource`, each of them one document."""

    kind = "python"

    def documents(self) -> Iterator[Document]:
        """See `Corpus.documents`."""
        self._begin()
        for number, text in enumerate(self._source.texts()):
            name = f"{self._source}[{number}]"
            if not isinstance(text, str):
                raise UserError(f"{name}: of type {type(text).__name__}; give strings")
            self.bytes_read += len(text)
            yield Document(name, text_pieces(text))

    def fingerprint(self) -> str:
        """SHA-256 hex over the texts, which are measured on the way."""
        digest = hashlib.sha256()
        for entry, _ in self.items():
            digest.update(json.dumps(entry).encode())
        self.total_bytes = self.bytes_read
        return digest.hexdigest()
