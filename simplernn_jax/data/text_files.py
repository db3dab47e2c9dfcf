"""Text files as a corpus: each file is a document, read piece by piece."""

import codecs
from collections.abc import Iterator

from simplernn_jax.data.documents import PIECE_SIZE, Corpus, Document, Piece
from simplernn_jax.data.source_files import SourceFile, open_source
from simplernn_jax.errors import UserError


class TextFiles(Corpus):
    """UTF-8 text files, each of them one document."""

    def __init__(self, files: list[SourceFile], encoding_errors: str) -> None:
        super().__init__(files, encoding_errors, kind="text")

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
        with open_source(source.path) as (stream, file):
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
                self.bytes_read = before + file.tell()
                text = rest + text
                stop = len(text) if last else text.rfind("\n") + 1 or len(text)
                if stop:
                    yield Piece(text[:stop])
                rest = text[stop:]
