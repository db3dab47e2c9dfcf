"""JSONL files as a corpus: each record's field is a document."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

from simplernn_jax.data.bad_records import BadRecord, BadRecords, missing_field, wrong_type
from simplernn_jax.data.documents import Document, text_pieces
from simplernn_jax.data.source_files import SourceFile, files_fingerprint, open_source, total_size
from simplernn_jax.errors import UserError

LARGEST_RECORD = 1 << 26
"""Bytes of a line. A larger one is a JSON array or another format rather than a record."""


class JsonlFiles:
    """A corpus of JSONL files: one record in each line, blank lines left out."""

    def __init__(
        self, files: list[SourceFile], field: str, encoding_errors: str, max_bad_records: int
    ) -> None:
        self._files = files
        self._field = field
        self._encoding_errors = encoding_errors
        self._bad_records = BadRecords(max_bad_records)
        self.total_bytes = total_size(files)
        self.bytes_read = 0

    def fingerprint(self) -> str:
        """See `Corpus.fingerprint`."""
        return files_fingerprint(self._files, kind="jsonl", field=self._field)

    def documents(self) -> Iterator[Document]:
        """See `Corpus.documents`. Bad records within the limit are skipped and counted."""
        self.bytes_read = 0
        self._bad_records.start()
        for file in self._files:
            for number, offset, line in self._lines(file):
                try:
                    text = self._text(line, offset)
                except BadRecord as error:
                    self._bad_records.add(f"{file.path}:{number}", error)
                    continue
                yield Document(f"{file.name}:{number}", text_pieces(text))
        self._bad_records.finish()

    def _lines(self, file: SourceFile) -> Iterator[tuple[int, int, bytes]]:
        """Number, offset and bytes of each line that is not blank."""
        before = self.bytes_read
        end = 0
        with open_source(file.path) as source:
            for number in itertools.count(1):
                line = source.stream.readline(LARGEST_RECORD)
                if not line or number % 256 == 0:  # asking for it takes as long as a short line
                    self.bytes_read = before + source.bytes_read
                if not line:
                    break
                if len(line) == LARGEST_RECORD:
                    raise UserError(
                        f"{file.path}:{number}: a line of more than {LARGEST_RECORD >> 20} MiB; "
                        "write one JSON object in each line"
                    )
                end += len(line)
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, end - len(line), line

    def _text(self, line: bytes, offset: int) -> str:
        try:
            record = json.loads(line.decode("utf-8", self._encoding_errors))
        except UnicodeDecodeError as error:
            raise BadRecord(f"invalid UTF-8 at byte {offset + error.start} of the file") from error
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"not JSON ({error})") from error
        if not isinstance(record, dict):
            raise BadRecord(f"of type {type(record).__name__}, not an object")
        text = self._field_of(record)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            if self._encoding_errors == "strict":
                raise BadRecord(
                    f"field {self._field!r} holds half a surrogate pair, which is no character"
                ) from error
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return text

    def _field_of(self, record: dict[str, Any]) -> str:
        if self._field not in record:
            raise missing_field(self._field, record)
        text = record[self._field]
        if not isinstance(text, str):
            raise wrong_type(self._field, type(text).__name__)
        return text
