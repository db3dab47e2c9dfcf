"""JSONL files as a corpus: each record's field is a document."""

import itertools
import json
import os
from collections.abc import Iterator
from typing import Any

from absl import logging

from simplernn_jax.config import nearest_name
from simplernn_jax.data.documents import Document, text_pieces
from simplernn_jax.data.text_files import SourceFile, files_fingerprint, open_source
from simplernn_jax.errors import UserError, one_line

LARGEST_RECORD = 1 << 26
"""Bytes of a line. A larger one is a JSON array or another format rather than a record."""

_NAMED_FIELDS = 8
"""Fields that an error names at most: a line can hold millions."""


class _BadRecord(Exception):
    """Says why a line is no record."""


class JsonlFiles:
    """A corpus of JSONL files: one record in each line, blank lines left out."""

    def __init__(
        self, files: list[SourceFile], field: str, encoding_errors: str, max_bad_records: int
    ) -> None:
        self._files = files
        self._field = field
        self._encoding_errors = encoding_errors
        self._max_bad_records = max_bad_records
        self._warned = False
        self.total_bytes = sum(os.path.getsize(file.path) for file in files)
        self.bytes_read = 0

    def fingerprint(self) -> str:
        """See `Corpus.fingerprint`."""
        return files_fingerprint(self._files, kind="jsonl", field=self._field)

    def documents(self) -> Iterator[Document]:
        """See `Corpus.documents`. Bad records within the limit are skipped and counted."""
        self.bytes_read = 0
        bad = 0
        first = ""
        for file in self._files:
            for number, offset, line in self._lines(file):
                try:
                    text = self._text(line, offset)
                except _BadRecord as error:
                    bad += 1
                    problem = one_line(f"{file.path}:{number}: {error}")
                    first = first or problem
                    if bad > self._max_bad_records:
                        raise UserError(
                            f"{problem}; bad record {bad}, {self._max_bad_records} allowed: mend "
                            "it or raise max_bad_records (train.py: "
                            "--config.data.max_bad_records)"
                        ) from error
                    continue
                yield Document(f"{file.name}:{number}", text_pieces(text))
        if bad and not self._warned:
            self._warned = True
            if bad == 1:
                logging.warning("1 bad record skipped: %s", first)
            else:
                logging.warning("%d bad records skipped, the first of them %s", bad, first)

    def _lines(self, file: SourceFile) -> Iterator[tuple[int, int, bytes]]:
        """Number, offset and bytes of each line that is not blank."""
        end = 0
        with open_source(file.path) as stream:
            for number in itertools.count(1):
                line = stream.readline(LARGEST_RECORD)
                if not line:
                    break
                if len(line) == LARGEST_RECORD:
                    raise UserError(
                        f"{file.path}:{number}: a line of more than {LARGEST_RECORD >> 20} MiB; "
                        "write one JSON object in each line"
                    )
                end += len(line)
                self.bytes_read += len(line)
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, end - len(line), line

    def _text(self, line: bytes, offset: int) -> str:
        try:
            record = json.loads(line.decode("utf-8", self._encoding_errors))
        except UnicodeDecodeError as error:
            raise _BadRecord(f"invalid UTF-8 at byte {offset + error.start} of the file") from error
        except (ValueError, RecursionError) as error:
            raise _BadRecord(f"not JSON ({error})") from error
        if not isinstance(record, dict):
            raise _BadRecord(f"of type {type(record).__name__}, not an object")
        text = self._field_of(record)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            if self._encoding_errors == "strict":
                raise _BadRecord(
                    f"field {self._field!r} holds half a surrogate pair, which is no character"
                ) from error
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return text

    def _field_of(self, record: dict[str, Any]) -> str:
        if self._field not in record:
            fields = [name[:30] for name in itertools.islice(record, _NAMED_FIELDS)]
            raise _BadRecord(
                f"no field {self._field!r}{nearest_name(self._field, fields)}; it has "
                f"{', '.join(fields) or 'none'}: say with field=NAME (train.py: "
                "--config.data.field=NAME) which holds the text"
            )
        text = record[self._field]
        if not isinstance(text, str):
            raise _BadRecord(f"field {self._field!r} is of type {type(text).__name__}, not text")
        return text
