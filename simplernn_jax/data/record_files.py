"""Files of records as a corpus: JSONL and Parquet, one field of each record is a document.

In JSONL, the field may hold the messages of a conversation, which a template turns into text.
"""

import abc
import importlib.util
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from simplernn_jax.data.chat_template import ChatTemplate, Message, TemplateError, messages_of
from simplernn_jax.data.documents import (
    BadRecord,
    Corpus,
    Document,
    Entry,
    Piece,
    entries_of,
    text_pieces,
)
from simplernn_jax.data.source_files import SourceFile, file_status, library_errors, open_source
from simplernn_jax.errors import UserError, nearest_name, one_line

MAX_RECORD_BYTES = 1 << 26
"""Bytes of a JSONL line. A larger one is a JSON array or another format rather than a record."""

_PARQUET_ROWS = 16
"""Rows held at a time, besides the pages that hold them."""
_READ_BUFFER = 1 << 20
_RENDERED_TOGETHER = 64
"""Conversations rendered together."""

_NAMED_FIELDS = 8
"""Fields that an error names at most: a record can have millions."""
_CHAT = ("messages", "conversations")
_NO_TEMPLATE = "conversations need a template (train.py: --config.data.template=roles)"


class RecordFiles(Corpus):
    """Files of records. Bad records within a limit are skipped, counted and warned of once."""

    kind: str

    def __init__(
        self,
        files: list[SourceFile],
        field: str,
        encoding_errors: str,
        max_bad_records: int,
        **settings: Any,
    ) -> None:
        super().__init__(files, encoding_errors, kind=self.kind, field=field, **settings)
        self._field = field
        self._max_bad_records = max_bad_records

    def documents(self) -> Iterator[Document]:
        """See `Corpus.documents`."""
        for (path, name, place, value), _ in self.items():
            (pieces,) = self._pieces_of_each([value])
            if isinstance(pieces, BadRecord):
                self.skip(_problem(path, place, pieces))
            else:
                yield Document(f"{name}{place}", pieces)
        self.warn_of_skipped()

    def items(self) -> Iterator[tuple[tuple[str, str, str, Any], int]]:
        """See `Corpus.items`; yields the path and name of a file, and the place in it, too."""
        self._begin()
        for file in self._files:
            for place, value, size in self._records(file):
                yield (file.path, file.name, place, value), size

    def entries(
        self, items: Sequence[tuple[str, str, str, Any]]
    ) -> Iterator[Iterable[Entry] | BadRecord]:
        """See `Corpus.entries`."""
        found = self._pieces_of_each([value for *_, value in items])
        for (path, _, place, _), pieces in zip(items, found, strict=True):
            if isinstance(pieces, BadRecord):
                yield BadRecord(_problem(path, place, pieces))
            else:
                yield entries_of(pieces)

    @abc.abstractmethod
    def _records(self, file: SourceFile) -> Iterator[tuple[str, Any, int]]:
        """Yield the place of each record in the file, what `_pieces` needs of it, and its size."""

    @abc.abstractmethod
    def _pieces(self, value: Any) -> Iterator[Piece]:
        """Extract the text of a record, or raise `BadRecord`."""

    def _pieces_of_each(self, values: Sequence[Any]) -> Iterator[Iterator[Piece] | BadRecord]:
        for value in values:
            try:
                yield self._pieces(value)
            except BadRecord as error:
                yield error


class JsonlFiles(RecordFiles):
    """JSONL files: one record in each line, blank lines left out."""

    kind = "jsonl"

    def _records(self, file: SourceFile) -> Iterator[tuple[str, tuple[int, bytes], int]]:
        """Yield the number of each line that is not blank, its offset and bytes, and its size."""
        before = self.bytes_read
        end = 0
        with open_source(file.path) as (stream, raw):
            for number in itertools.count(1):
                line = stream.readline(MAX_RECORD_BYTES + 1)
                if not line or number % 256 == 0:  # asking for it takes as long as a short line
                    self.bytes_read = before + raw.tell()
                if not line:
                    break
                if len(line) > MAX_RECORD_BYTES:
                    raise UserError(
                        f"{file.path}:{number}: a line of more than {MAX_RECORD_BYTES >> 20} MiB; "
                        "write one JSON object in each line"
                    )
                end += len(line)
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield f":{number}", (end - len(line), line), len(line)

    def _pieces(self, value: tuple[int, bytes]) -> Iterator[Piece]:
        record = self._record(*value)
        if self._field not in record:
            raise BadRecord(_missing_field(self._field, record))
        text = record[self._field]
        if not isinstance(text, str):
            raise BadRecord(_wrong_type(self._field, type(text).__name__))
        return text_pieces(self._without_surrogates(text))

    def _record(self, offset: int, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line.decode("utf-8", self._encoding_errors))
        except UnicodeDecodeError as error:
            raise BadRecord(f"invalid UTF-8 at byte {offset + error.start} of the file") from error
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"not JSON ({error})") from error
        if not isinstance(record, dict):
            raise BadRecord(f"of type {type(record).__name__}, not an object")
        return record

    def _without_surrogates(self, text: str) -> str:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            if self._encoding_errors == "strict":
                raise BadRecord(
                    f"field {self._field!r} holds half a surrogate pair, which is not a character"
                ) from error
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return text


class ConversationFiles(JsonlFiles):
    """JSONL files of conversations, as `messages_of` takes them.

    Args:
      *settings: as of `RecordFiles`.
      template: text of a `ChatTemplate`.
      only_assistant: whether only the assistant's messages are targets of the loss.
    """

    kind = "conversations"

    def __init__(self, *settings: Any, template: str, only_assistant: bool) -> None:
        super().__init__(*settings, template=template, only_assistant=only_assistant)
        self._template = ChatTemplate(template)
        self._only_assistant = only_assistant

    def _pieces_of_each(self, values: Sequence[Any]) -> Iterator[Iterator[Piece] | BadRecord]:
        for start in range(0, len(values), _RENDERED_TOGETHER):
            some = [self._messages(*value) for value in values[start : start + _RENDERED_TOGETHER]]
            rendered = self._template.pieces(
                [one for one in some if isinstance(one, list)], only_assistant=self._only_assistant
            )
            for one in some:
                pieces = next(rendered) if isinstance(one, list) else one
                yield iter(pieces) if isinstance(pieces, list) else BadRecord(str(pieces))

    def _messages(self, offset: int, line: bytes) -> list[Message] | BadRecord:
        try:
            messages = messages_of(self._record(offset, line), self._field)
            for message in messages:
                message["content"] = self._without_surrogates(message["content"])
            return messages
        except (BadRecord, TemplateError) as error:
            return BadRecord(str(error))


class ParquetFiles(RecordFiles):
    """Parquet files: each row of one column of text is a document.

    Memory is bounded by the largest page, which the writer of the file chose, mostly about 1 MiB.

    Raises:
      UserError: pyarrow is not installed.
    """

    kind = "parquet"

    def __init__(self, files: list[SourceFile], *settings: Any) -> None:
        if importlib.util.find_spec("pyarrow") is None:
            raise UserError(
                f"{files[0].path}: reading Parquet needs pyarrow; install it with "
                "pip install pyarrow"
            )
        super().__init__(files, *settings)

    def _records(self, file: SourceFile) -> Iterator[tuple[str, bytes | None, int]]:
        """Yield the number of each row, the content of its field, and its size."""
        import pyarrow as pa
        from pyarrow import parquet

        before, size = self.bytes_read, file_status(file.path).st_size
        damaged = f"{file.path}: not a whole Parquet file", "replace it by a whole copy"
        with open_source(file.path) as (_, raw):
            with library_errors(*damaged):
                # Without a pre-buffer, a column is read page by page.
                table = parquet.ParquetFile(
                    raw, pre_buffer=False, buffer_size=_READ_BUFFER, page_checksum_verification=True
                )
                self._check_column(file.path, table.schema_arrow)
                num_rows = table.metadata.num_rows
                batches = table.iter_batches(
                    _PARQUET_ROWS, columns=[self._field], use_threads=False
                )
            number = 0
            while True:
                with library_errors(*damaged):
                    batch = next(batches, None)
                    if batch is None:
                        break
                    values = batch.column(0).cast(pa.large_binary()).to_pylist()
                for value in values:
                    self.bytes_read = before + size * number // max(num_rows, number + 1)
                    yield f": row {number}", value, len(value or b"")
                    number += 1
        self.bytes_read = before + size

    def _check_column(self, path: str, schema: Any) -> None:
        from pyarrow import types

        if self._field not in schema.names:
            raise UserError(f"{path}: {_missing_field(self._field, schema.names)}")
        found = schema.field(self._field).type
        plain = found.value_type if types.is_dictionary(found) else found
        is_text = (
            types.is_string,
            types.is_large_string,
            types.is_string_view,
            types.is_binary,
            types.is_large_binary,
            types.is_binary_view,
        )
        if not any(is_type(plain) for is_type in is_text):
            raise UserError(
                f"{path}: {_wrong_type(self._field, str(found))}; choose another with "
                "--config.data.field=NAME"
            )

    def _pieces(self, value: bytes | None) -> Iterator[Piece]:
        if value is None:
            raise BadRecord(_wrong_type(self._field, "null"))
        try:
            return text_pieces(value.decode("utf-8", self._encoding_errors))
        except UnicodeDecodeError as error:
            raise BadRecord(
                f"invalid UTF-8 at byte {error.start} of field {self._field!r}"
            ) from error


def _problem(path: str, place: str, error: BadRecord) -> str:
    return one_line(f"{path}{place}: {error}")


def _missing_field(field: str, fields: Iterable[str]) -> str:
    """Describe a record that has other `fields` than the wanted one."""
    fields = list(fields)
    named = [name[:30] for name in fields[:_NAMED_FIELDS]]
    near = nearest_name(field, named)
    chat = next((name for name in _CHAT if name in fields), None)
    if chat and not near:
        return f"no field {field!r} but {chat!r}; {_NO_TEMPLATE}"
    return (
        f"no field {field!r}{near}; it has {', '.join(named) or 'none'}: say "
        "with field=NAME (train.py: --config.data.field=NAME) which holds the text"
    )


def _wrong_type(field: str, found: str) -> str:
    """Describe a record whose field is not text but of the type `found`."""
    hint = f"; {_NO_TEMPLATE}" if field in _CHAT else ""
    return f"field {field!r} is of type {found}, not text{hint}"
