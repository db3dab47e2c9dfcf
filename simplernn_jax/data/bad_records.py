"""Records that are no text: counted, skipped within a limit, and warned of once."""

from collections.abc import Iterable

from absl import logging

from simplernn_jax.errors import UserError, nearest_name, one_line

_NAMED_FIELDS = 8
"""Fields that an error names at most: a record can have millions."""
_CHAT = "messages"
_NO_CHAT = "chats cannot be trained on yet: write each as one text into a field of its own"


class BadRecord(Exception):
    """Says why a record is none."""


class BadRecords:
    """The bad records of one corpus, counted anew for each time that it is read."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._warned = False
        self._count = 0
        self._first = ""

    def start(self) -> None:
        """Begin to count."""
        self._count = 0

    def add(self, where: str, problem: BadRecord) -> None:
        """Count one.

        Raises:
          UserError: it is one more than the limit.
        """
        text = one_line(f"{where}: {problem}")
        self._first = self._first or text
        self._count += 1
        if self._count > self._limit:
            raise UserError(
                f"{text}; bad record {self._count}, {self._limit} allowed: fix it or raise "
                "max_bad_records (train.py: --config.data.max_bad_records)"
            ) from problem

    def finish(self) -> None:
        """Warn of those that were skipped, the first time."""
        if not self._count or self._warned:
            return
        self._warned = True
        if self._count == 1:
            logging.warning("1 bad record skipped: %s", self._first)
        else:
            logging.warning(
                "%d bad records skipped, the first of them %s", self._count, self._first
            )


def missing_field(field: str, fields: Iterable[str]) -> BadRecord:
    """What is wrong with a record that has other `fields` than the wanted one."""
    fields = list(fields)
    named = [name[:30] for name in fields[:_NAMED_FIELDS]]
    near = nearest_name(field, named)
    if _CHAT in fields and not near:
        return BadRecord(f"no field {field!r} but {_CHAT!r}; {_NO_CHAT}")
    return BadRecord(
        f"no field {field!r}{near}; it has {', '.join(named) or 'none'}: say "
        "with field=NAME (train.py: --config.data.field=NAME) which holds the text"
    )


def wrong_type(field: str, found: str) -> BadRecord:
    """What is wrong with a record whose field is not text but of the type `found`."""
    hint = f"; {_NO_CHAT}" if field == _CHAT else ""
    return BadRecord(f"field {field!r} is of type {found}, not text{hint}")
