"""Files of records as a corpus: JSON, CSV and Parquet, one field of each record is a document.

In JSON, the field may hold the messages of a conversation, which a template turns into text.
"""

import csv
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from simplernn_jax.config import DataConfig
from simplernn_jax.data.chat_template import ChatTemplate, Message, TemplateError, messages_of
from simplernn_jax.data.documents import (
    Corpus,
    Document,
    Entry,
    MalformedRecord,
    Piece,
    entries_of,
    text_pieces,
)
from simplernn_jax.data.source_files import SourceFile, open_source
from simplernn_jax.errors import UserError, nearest_name, one_line

MAX_RECORD_BYTES = 1 << 26
"""Bytes of a line, a JSON array, a row of CSV or a Parquet value, which are in memory at once. A
larger line is another format rather than a record."""
_RENDERED_TOGETHER = 64
"""Conversations rendered together."""

_NAMED_FIELDS = 8
"""Maximum number of fields that an error names: a record can have millions."""
_CHAT = ("messages", "conversations")
_NO_TEMPLATE = "conversations need a template (train.py: --config.data.template=roles)"


class RecordFiles(Corpus):
    """Files of records. Bad records within a limit are skipped, counted and warned of once."""

    def __init__(self, files: list[SourceFile], config: DataConfig, **settings: Any) -> None:
        super().__init__(files, config, field=config.field, **settings)
        self._field = config.field

    def documents(self) -> Iterator[Document]:
        """See `Corpus.documents`."""
        for item, _ in self.items():
            (pieces,) = self._pieces_of([item])
            if isinstance(pieces, MalformedRecord):
                self.skip(str(pieces))
            else:
                yield Document(f"{item[1]}{item[2]}", pieces)
        self.warn_of_skipped()

    def items(self) -> Iterator[tuple[tuple[str, str, str, Any], int]]:
        """See `Corpus.items`; yields the path and name of a file, and the place in it, too."""
        self._begin()
        for file in self._files:
            for place, value, size in self._records(file):
                yield (file.path, file.name, place, value), size

    def entries(self, items: Sequence[Any]) -> Iterator[Iterable[Entry] | MalformedRecord]:
        """See `Corpus.entries`."""
        for pieces in self._pieces_of(items):
            yield pieces if isinstance(pieces, MalformedRecord) else entries_of(pieces)

    def _pieces_of(self, items: Sequence[Any]) -> Iterator[Iterator[Piece] | MalformedRecord]:
        found = self._pieces_of_each([value for *_, value in items])
        for (path, _, place, _), pieces in zip(items, found, strict=True):
            is_bad = isinstance(pieces, MalformedRecord)
            yield MalformedRecord(one_line(f"{path}{place}: {pieces}")) if is_bad else pieces

    def _pieces_of_each(self, values: Sequence[Any]) -> Iterator[Iterator[Piece] | MalformedRecord]:
        for value in values:
            try:
                yield self._pieces(value)
            except MalformedRecord as error:
                yield error

    def _records(self, file: SourceFile) -> Iterator[tuple[str, Any, int]]:
        """Yield the place, what `_field_of` takes, and the size; checks the file's expansion."""
        raise NotImplementedError

    def _field_of(self, value: Any) -> Any:
        """Return the field of a record, or raise `MalformedRecord`."""
        return value

    def _pieces(self, value: Any) -> Iterator[Piece]:
        """Extract the text of a record, or raise `MalformedRecord`."""
        text = self._field_of(value)
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8", self._encoding_errors)
            except UnicodeDecodeError as error:
                where = f"at byte {error.start} of field {self._field!r}"
                raise MalformedRecord(f"invalid UTF-8 {where}") from error
        if not isinstance(text, str):
            raise MalformedRecord(wrong_type(self._field, type(text).__name__))
        return text_pieces(self._without_surrogates(text))

    def _without_surrogates(self, text: str) -> str:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            if self._encoding_errors == "strict":
                raise MalformedRecord(
                    f"field {self._field!r} holds half a surrogate pair or invalid UTF-8"
                ) from error
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return text


class JsonFiles(RecordFiles):
    """JSON files: a record in each line, blank lines left out; or one array of records."""

    kind = "jsonl"

    def _records(self, file: SourceFile) -> Iterator[tuple[str, Any, int]]:
        lines = self._lines(file)
        may_be_array = re.search(r"\.json(\.\w+)?$", file.path.lower())
        for number, line in enumerate(lines, 1):
            content = line.strip()
            if may_be_array and (content == b"{" or content.startswith(b"[")):
                yield from self._array(itertools.chain([line], lines))
            elif content:
                may_be_array = None
                yield f":{number}", line, len(line)
            self._record_bytes = 0

    def _array(self, lines: Iterable[bytes]) -> Iterator[tuple[str, Any, int]]:
        """Yield the records of a file that holds one array, or one object over several lines."""
        content = bytearray()
        for line in lines:
            content += line
        try:
            found = self._parsed(bytes(content))
        except MalformedRecord as error:
            found = error
        records = found if isinstance(found, list) else [found]
        for number, record in enumerate(records):
            yield f"[{number}]", record, len(content) // len(records)

    def _lines(self, file: SourceFile) -> Iterator[bytes]:
        """Yield the lines, added to `_record_bytes`, which the caller sets to 0 for each record."""
        before, num_bytes, self._record_bytes = self.bytes_read, 0, 0
        with open_source(file.path, self._encoding_errors) as (stream, raw):
            for number in itertools.count(1):
                line = stream.readline(MAX_RECORD_BYTES + 1)
                num_bytes += len(line)
                self._check_expansion(file, num_bytes)
                if not line or number % 256 == 0:  # asking for it takes as long as a short line
                    self.bytes_read = before + raw.tell()
                if not line:
                    break
                self._record_bytes += len(line)
                if self._record_bytes > MAX_RECORD_BYTES:
                    raise too_long(f"{file.path}:{number}: a record or array")
                yield line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line

    def _field_of(self, value: Any) -> Any:
        """See `RecordFiles._field_of`."""
        record = self._record(value)
        if self._field not in record:
            raise MalformedRecord(missing_field(self._field, record))
        return record[self._field]

    def _record(self, value: Any) -> dict[str, Any]:
        """Return a record that is given as a line, as itself, or as a `MalformedRecord`."""
        record = self._parsed(value) if isinstance(value, bytes) else value
        if isinstance(record, MalformedRecord):
            raise record
        if not isinstance(record, dict):
            raise MalformedRecord(f"of type {type(record).__name__}, not an object")
        return record

    def _parsed(self, content: bytes) -> Any:
        try:
            return json.loads(content.decode("utf-8", self._encoding_errors))
        except UnicodeDecodeError as error:
            raise MalformedRecord(f"invalid UTF-8 at byte {error.start}") from error
        except (ValueError, RecursionError) as error:
            raise MalformedRecord(f"not JSON ({error})") from error


class CsvFiles(JsonFiles):
    """CSV files: a header, then one record in each row, blank lines left out.

    The delimiter is the most frequent one in the header of tab, comma and semicolon. In ``.tsv``
    it is a tab, and quotes are text.
    """

    kind = "csv"

    def _records(self, file: SourceFile) -> Iterator[tuple[str, Any, int]]:
        lines = self._lines(file)
        header = next(lines, b"")
        # Half surrogates, in place of invalid bytes, are bad where they matter: in the field.
        errors = self._encoding_errors.replace("strict", "surrogateescape")
        csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD_BYTES))
        is_tsv = re.search(r"\.tsv(\.\w+)?$", file.path.lower())
        rows = csv.DictReader(
            (line.decode("utf-8", errors) for line in itertools.chain([header], lines)),
            delimiter="\t" if is_tsv else max("\t,;", key=header.decode("latin-1").count),
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
            size, self._record_bytes = self._record_bytes, 0
            yield f":{rows.reader.line_num}", row, size


class ConversationFiles(JsonFiles):
    """JSON files of conversations, as `messages_of` takes them.

    ``config.template`` is the text of a `ChatTemplate`.
    """

    kind = "conversations"

    def __init__(self, files: list[SourceFile], config: DataConfig) -> None:
        only_assistant = config.loss_on == "assistant"
        super().__init__(files, config, template=config.template, only_assistant=only_assistant)
        self._template, self._only_assistant = ChatTemplate(config.template), only_assistant

    def _pieces_of_each(self, values: Sequence[Any]) -> Iterator[Iterator[Piece] | MalformedRecord]:
        for start in range(0, len(values), _RENDERED_TOGETHER):
            some = [self._messages(value) for value in values[start : start + _RENDERED_TOGETHER]]
            rendered = self._template.pieces(
                [one for one in some if isinstance(one, list)], only_assistant=self._only_assistant
            )
            for one in some:
                pieces = next(rendered) if isinstance(one, list) else one
                yield iter(pieces) if isinstance(pieces, list) else MalformedRecord(str(pieces))

    def _messages(self, value: Any) -> list[Message] | MalformedRecord:
        try:
            messages = messages_of(self._record(value), self._field)
            for message in messages:
                message["content"] = self._without_surrogates(message["content"])
            return messages
        except (MalformedRecord, TemplateError) as error:
            return MalformedRecord(str(error))


def too_long(what: str) -> UserError:
    """Return the error for a record, array or text of more than `MAX_RECORD_BYTES`."""
    return UserError(
        f"{what} of more than {MAX_RECORD_BYTES >> 20} MiB; split it into several records, one in "
        "each line (of a JSON array with jq -c '.[]')"
    )


def missing_field(field: str, fields: Iterable[str]) -> str:
    """Describe a record that has other `fields` than the wanted one."""
    fields = list(fields)
    named = [name[:30] for name in fields[:_NAMED_FIELDS]]
    near = nearest_name(field, named)
    chat = next((name for name in _CHAT if name in fields), None)
    if chat and not near:
        return f"no field {field!r} but {chat!r}; {_NO_TEMPLATE}"
    return (
        f"no field {field!r}{near}; it has {', '.join(named) or 'none'}: name "
        "the one with the text by field=NAME (train.py: --config.data.field=NAME)"
    )


def wrong_type(field: str, found: str) -> str:
    """Describe a record whose field is not text but of the type `found`."""
    hint = f"; {_NO_TEMPLATE}" if field in _CHAT else ""
    return f"field {field!r} is of type {found}, not text{hint}"
