"""Files of records as a corpus: JSON, CSV and Parquet, one field of each record is a document.

In JSON, the field may hold the messages of a conversation, which a template turns into text.
"""

import csv
import importlib.util
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

from simplernn_jax.config import DataConfig
from simplernn_jax.data.chat_template import ChatTemplate, Message, messages_of
from simplernn_jax.data.documents import Corpus, MalformedRecord, Piece, cut_text, pieces_of
from simplernn_jax.data.source_files import COMPRESSED_SUFFIXES, SourceFile
from simplernn_jax.errors import UserError, library_errors
from simplernn_jax.files import open_file

MAX_RECORD_BYTES = 1 << 26
"""Bytes of a line, a JSON array, a row of CSV or a Parquet value, which are in memory at once. A
larger line is another format rather than a record."""
_RENDERED_TOGETHER = 64
"""Conversations rendered together."""

_CHAT_FIELDS = ("messages", "conversations")
_CHAT_ADVICE = "; conversations need config.data.template"
_ROWS = 16
"""Rows of Parquet held at a time, besides the pages that hold them."""
_READ_BUFFER = 1 << 20


class RecordFiles(Corpus):
    """Files of records. Malformed ones within a limit are skipped, counted and warned of once."""

    def __init__(self, files: list[SourceFile], config: DataConfig, **settings: Any) -> None:
        super().__init__(files, config, field=config.field, **settings)
        self._field = config.field
        # Half surrogates, in place of invalid bytes, are bad where they matter: in the field.
        self._decode_errors = config.encoding_errors.replace("strict", "surrogateescape")

    def _field_of(self, content: Any) -> Any:
        """Return the field of a record, or raise `MalformedRecord`."""
        return content

    def _pieces(self, content: Any) -> Iterator[Piece]:
        text = self._field_of(content)
        if isinstance(text, bytes):
            text = text.decode("utf-8", self._decode_errors)
        if not isinstance(text, str):
            found = type(text).__name__
            hint = _CHAT_ADVICE if self._field in _CHAT_FIELDS else ""
            raise MalformedRecord(f"field {self._field!r} is of type {found}, not text{hint}")
        return pieces_of(cut_text(self._without_surrogates(text)))

    def _without_surrogates(self, text: str) -> str:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            if self._config.encoding_errors == "strict":
                raise MalformedRecord(
                    f"field {self._field!r} holds half a surrogate pair or invalid UTF-8"
                ) from error
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return text


class JsonFiles(RecordFiles):
    """JSON files: a record in each line, blank lines left out; or one array of records."""

    kind = "jsonl"

    def _read(self, file: SourceFile) -> Iterator[tuple[str, Any, int]]:
        with self._opened(file) as stream:
            may_be_array = suffix_of(file.path) == ".json"
            for number, line in enumerate(_lines(file, stream), 1):
                content = line.strip()
                if may_be_array and content.startswith(b"["):
                    yield from self._array(file, line + stream.read(MAX_RECORD_BYTES))
                elif content:
                    may_be_array = False
                    yield f":{number}", line, len(line)

    def _array(self, file: SourceFile, content: bytes) -> Iterator[tuple[str, Any, int]]:
        """Yield the records of a file that holds one array."""
        if len(content) > MAX_RECORD_BYTES:
            raise _too_long(f"{file.path}: an array")
        try:
            records = self._parsed(content)
        except MalformedRecord as error:
            records = [error]
        for number, record in enumerate(records):
            yield f"[{number}]", record, len(content) // len(records)

    def _field_of(self, content: Any) -> Any:
        record = self._record(content)
        if self._field not in record:
            raise MalformedRecord(missing_field(self._field, record))
        return record[self._field]

    def _record(self, content: Any) -> dict[str, Any]:
        """Return a record that is given as a line, as itself, or as a `MalformedRecord`."""
        record = self._parsed(content) if isinstance(content, bytes) else content
        if isinstance(record, MalformedRecord):
            raise record
        if not isinstance(record, dict):
            raise MalformedRecord(f"of type {type(record).__name__}, not an object")
        return record

    def _parsed(self, content: bytes) -> Any:
        try:
            return json.loads(content.decode("utf-8", self._decode_errors))
        except (ValueError, RecursionError) as error:
            raise MalformedRecord(f"not JSON ({error})") from error


class CsvFiles(JsonFiles):
    """CSV files: a header, then one record in each row, blank lines left out.

    The delimiter is the most frequent one in the header of tab, comma and semicolon. In ``.tsv``
    it is a tab, and quotes are text.
    """

    kind = "csv"

    def _read(self, file: SourceFile) -> Iterator[tuple[str, Any, int]]:
        csv.field_size_limit(MAX_RECORD_BYTES)
        is_tsv = suffix_of(file.path) == ".tsv"
        size = 0

        def decoded(stream: IO[bytes]) -> Iterator[str]:
            nonlocal size
            for line in _lines(file, stream):
                size += len(line)
                if size > MAX_RECORD_BYTES:
                    raise _too_long(f"{file.path}: a row")
                yield line.decode("utf-8", self._decode_errors)

        with self._opened(file) as stream:
            lines = decoded(stream)
            header = next(lines, "")
            rows = csv.DictReader(
                itertools.chain([header], lines),
                delimiter="\t" if is_tsv else max("\t,;", key=header.count),
                quoting=csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL,
                strict=True,
            )
            while True:
                try:
                    row: Any = next(rows, None)
                    if row is None:
                        return
                    if None in row:
                        raise csv.Error("more values than the header has names")
                except csv.Error as error:
                    row = MalformedRecord(f"invalid CSV ({error})")
                num_bytes, size = size, 0
                yield f":{rows.reader.line_num}", row, num_bytes


class ConversationFiles(JsonFiles):
    """JSON files of conversations, as `messages_of` takes them.

    ``config.template`` is the text of a `ChatTemplate`.
    """

    kind = "conversations"

    def __init__(self, files: list[SourceFile], config: DataConfig) -> None:
        only_assistant = config.loss_mask == "assistant"
        super().__init__(files, config, template=config.template, only_assistant=only_assistant)
        self._template, self._only_assistant = ChatTemplate(config.template), only_assistant

    def _parse(self, contents: Sequence[Any]) -> Iterator[Iterable[Piece] | MalformedRecord]:
        for start in range(0, len(contents), _RENDERED_TOGETHER):
            some = [self._messages(one) for one in contents[start : start + _RENDERED_TOGETHER]]
            chats = [one for one in some if isinstance(one, list)]
            rendered = iter(self._template.pieces(chats, only_assistant=self._only_assistant))
            yield from (next(rendered) if isinstance(one, list) else one for one in some)

    def _messages(self, content: Any) -> list[Message] | MalformedRecord:
        try:
            messages = messages_of(self._record(content), self._field)
            for message in messages:
                message["content"] = self._without_surrogates(message["content"])
        except MalformedRecord as error:
            return error
        return messages


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

    def _read(self, file: SourceFile) -> Iterator[tuple[str, Any, int]]:
        import pyarrow as pa
        from pyarrow import parquet

        number = num_bytes = 0
        with (
            library_errors(f"{file.path}: not a whole Parquet file", "use an intact copy"),
            open_file(file.path) as raw,
        ):
            # Without a pre-buffer, a column is read page by page.
            table = parquet.ParquetFile(
                raw, pre_buffer=False, buffer_size=_READ_BUFFER, page_checksum_verification=True
            )
            metadata, names = table.metadata, table.schema_arrow.names
            if self._field not in names:
                raise UserError(f"{file.path}: {missing_field(self._field, names)}")
            groups = map(metadata.row_group, range(metadata.num_row_groups))
            self._check_expansion(file, sum(group.total_byte_size for group in groups))
            for batch in table.iter_batches(_ROWS, columns=[self._field], use_threads=False):
                column = batch.column(0)
                kind = getattr(column.type, "value_type", column.type)  # of a dictionary
                if str(kind) in ("string", "large_string", "string_view"):
                    column = column.cast(pa.large_binary())  # it may be invalid UTF-8
                for value in column.to_pylist():
                    length = len(value) if isinstance(value, str | bytes) else 0
                    if length > MAX_RECORD_BYTES:
                        raise _too_long(f"{file.path}: row {number}: a text")
                    num_bytes += length
                    self._check_expansion(file, num_bytes)
                    yield f": row {number}", value, length
                    number += 1
                share = number / max(metadata.num_rows, number, 1)
                self.bytes_read = self._bytes_before + int(self._files[file] * share)


def suffix_of(path: str) -> str:
    """Return the suffix that names the format of a file, in lower case, without compression's."""
    name, suffix = os.path.splitext(path.lower())
    return os.path.splitext(name)[1] if suffix in COMPRESSED_SUFFIXES else suffix


def _lines(file: SourceFile, stream: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of a file, without a byte order mark."""
    for number in itertools.count(1):
        line = stream.readline(MAX_RECORD_BYTES + 1)
        if not line:
            return
        if len(line) > MAX_RECORD_BYTES:
            raise _too_long(f"{file.path}:{number}: a record")
        yield line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _too_long(what: str) -> UserError:
    """Return the error for a record, array or text of more than `MAX_RECORD_BYTES`."""
    return UserError(
        f"{what} of more than {MAX_RECORD_BYTES >> 20} MiB; split it into several records, one in "
        "each line (of a JSON array with jq -c '.[]')"
    )


def missing_field(field: str, fields: Iterable[str]) -> str:
    """Describe a record that has other `fields` than the wanted one."""
    some = [name[:30] for name in itertools.islice(fields, 8)]  # there can be millions
    named = f"no field {field!r}; it has {', '.join(some) or 'none'}"
    if {*some} & {*_CHAT_FIELDS}:
        return named + _CHAT_ADVICE
    return f"{named}: name the one with the text by config.data.field"
