"""Parquet files as a corpus: each row's field is a document."""

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

from simplernn_jax.data.bad_records import BadRecord, BadRecords, missing_field, wrong_type
from simplernn_jax.data.documents import Document, text_pieces
from simplernn_jax.data.source_files import SourceFile, files_fingerprint, open_source, total_size
from simplernn_jax.errors import UserError

_BATCH_ROWS = 16
"""Rows held at a time, besides the pages that hold them."""
_READ_BUFFER = 1 << 20


class ParquetFiles:
    """A corpus of Parquet files: one document in each row of one column of text.

    Memory is that of the largest page, which the writer of the file chose, about 1 MiB mostly.

    Raises:
      UserError: pyarrow is not installed.
    """

    def __init__(
        self, files: list[SourceFile], field: str, encoding_errors: str, max_bad_records: int
    ) -> None:
        if importlib.util.find_spec("pyarrow") is None:
            raise UserError(
                f"{files[0].path}: reading Parquet needs pyarrow; install it with "
                "pip install pyarrow"
            )
        self._files = files
        self._field = field
        self._encoding_errors = encoding_errors
        self._bad_records = BadRecords(max_bad_records)
        self.total_bytes = total_size(files)
        self.bytes_read = 0

    def fingerprint(self) -> str:
        """See `Corpus.fingerprint`."""
        return files_fingerprint(self._files, kind="parquet", field=self._field)

    def documents(self) -> Iterator[Document]:
        """See `Corpus.documents`. Rows without text are bad records, as in JSONL."""
        self.bytes_read = 0
        self._bad_records.start()
        before = 0
        for file in self._files:
            size = total_size([file])
            for number, share, value in self._values(file):
                self.bytes_read = before + int(size * share)
                try:
                    text = self._text(value)
                except BadRecord as error:
                    self._bad_records.add(f"{file.path}: row {number}", error)
                    continue
                yield Document(f"{file.name}: row {number}", text_pieces(text))
            before += size
            self.bytes_read = before
        self._bad_records.finish()

    def _values(self, file: SourceFile) -> Iterator[tuple[int, float, bytes | None]]:
        """Number, share of the file read so far, and content of each row's field."""
        import pyarrow as pa
        from pyarrow import parquet

        with open_source(file.path) as source:
            with _readable(file.path):
                # Without a pre-buffer, a column is read page by page.
                table = parquet.ParquetFile(
                    source.file,
                    pre_buffer=False,
                    buffer_size=_READ_BUFFER,
                    page_checksum_verification=True,
                )
                self._check_column(file.path, table.schema_arrow)
                rows = table.metadata.num_rows
                batches = table.iter_batches(_BATCH_ROWS, columns=[self._field], use_threads=False)
            number = 0
            while True:
                with _readable(file.path):
                    batch = next(batches, None)
                    if batch is None:
                        return
                    values = batch.column(0).cast(pa.large_binary()).to_pylist()
                for value in values:
                    yield number, number / max(rows, number + 1), value
                    number += 1

    def _check_column(self, path: str, schema: Any) -> None:
        from pyarrow import types

        if self._field not in schema.names:
            raise UserError(f"{path}: {missing_field(self._field, schema.names)}")
        found = schema.field(self._field).type
        plain = found.value_type if types.is_dictionary(found) else found
        is_text = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
        if not any(is_type(plain) for is_type in is_text):
            raise UserError(
                f"{path}: {wrong_type(self._field, str(found))}; choose another with "
                "--config.data.field=NAME"
            )

    def _text(self, value: bytes | None) -> str:
        if value is None:
            raise wrong_type(self._field, "null")
        try:
            return value.decode("utf-8", self._encoding_errors)
        except UnicodeDecodeError as error:
            raise BadRecord(
                f"invalid UTF-8 at byte {error.start} of field {self._field!r}"
            ) from error


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    """Turns what pyarrow raises for damaged files, which is of many classes, into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path}: not a whole Parquet file ({error}); replace it by a whole copy"
        ) from error
