"""Parquet files as a corpus: one column of text holds the documents."""

import importlib.util
from collections.abc import Iterator
from typing import Any

from simplernn_jax.config import DataConfig
from simplernn_jax.data.record_files import (
    MAX_RECORD_BYTES,
    RecordFiles,
    missing_field,
    too_long,
    wrong_type,
)
from simplernn_jax.data.source_files import SourceFile, library_errors, open_source
from simplernn_jax.errors import UserError

_ROWS = 16
"""Rows held at a time, besides the pages that hold them."""
_READ_BUFFER = 1 << 20


class ParquetFiles(RecordFiles):
    """Parquet files: each row of one column of text is a document.

    Memory is bounded by the largest page, which the writer of the file chose, mostly about 1 MiB,
    and by what `max_expansion` allows a row group.

    Raises:
      UserError: pyarrow is not installed.
    """

    kind = "parquet"

    def __init__(self, files: list[SourceFile], config: DataConfig) -> None:
        if importlib.util.find_spec("pyarrow") is None:
            raise UserError(
                f"{files[0].path}: reading Parquet needs pyarrow; install it with "
                "pip install pyarrow"
            )
        super().__init__(files, config)

    def _records(self, file: SourceFile) -> Iterator[tuple[str, bytes | None, int]]:
        """Yield the number of each row, the content of its field, and its size."""
        import pyarrow as pa
        from pyarrow import parquet

        before, size = self.bytes_read, self._files[file]
        damaged = f"{file.path}: not a whole Parquet file", "replace it by an intact copy"
        with open_source(file.path) as (_, raw):
            with library_errors(*damaged):
                # Without a pre-buffer, a column is read page by page.
                table = parquet.ParquetFile(
                    raw, pre_buffer=False, buffer_size=_READ_BUFFER, page_checksum_verification=True
                )
                self._check_column(file.path, table.schema_arrow)
                groups = map(table.metadata.row_group, range(table.num_row_groups))
                decompressed = sum(group.total_byte_size for group in groups)
                self._check_expansion(file, decompressed)
                num_rows = table.metadata.num_rows
                batches = table.iter_batches(_ROWS, columns=[self._field], use_threads=False)
            number = num_bytes = 0
            while True:
                with library_errors(*damaged):
                    batch = next(batches, None)
                    if batch is None:
                        break
                    values = batch.column(0).cast(pa.large_binary()).to_pylist()
                for value in values:
                    if (length := len(value or b"")) > MAX_RECORD_BYTES:
                        raise too_long(f"{file.path}: row {number}: a text")
                    num_bytes += length
                    self._check_expansion(file, num_bytes)
                    self.bytes_read = before + size * number // max(num_rows, number + 1)
                    yield f": row {number}", value, length
                    number += 1
        self.bytes_read = before + size

    def _check_column(self, path: str, schema: Any) -> None:
        if self._field not in schema.names:
            raise UserError(f"{path}: {missing_field(self._field, schema.names)}")
        found = schema.field(self._field).type
        plain = found.value_type if hasattr(found, "index_type") else found
        if str(plain).removeprefix("large_").removesuffix("_view") not in ("string", "binary"):
            raise UserError(
                f"{path}: {wrong_type(self._field, str(found))}; choose another with "
                "--config.data.field=NAME"
            )
