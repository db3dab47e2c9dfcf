"""Lines of ``metrics.jsonl``: one JSON object with a checksum each.

    {"step": 20, "kind": "train", "loss": 3.1, ..., "crc32": "5f3a0c11"}

The checksum is that of the row without it, as `json.dumps` writes it. Files of earlier versions
have none.
"""

import json
import math
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

Row = dict[str, Any]

LONGEST_LINE = 1 << 24
"""Bytes: 16 MiB."""


def encode(row: Row) -> bytes:
    """Return the line of a row; numbers that are not finite become null, as JSON has none."""
    values = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(values | {"crc32": _checksum(values)}, allow_nan=False).encode() + b"\n"


def rows_of(file: BinaryIO) -> Iterator[tuple[bytes, Row | None]]:
    """Yield each line that is not blank, and its row, or None where it is damaged.

    At most one line is in memory; of one that is longer than `LONGEST_LINE`, the beginning.
    """
    checked = False
    while line := file.readline(LONGEST_LINE):
        rest = line
        while len(rest) == LONGEST_LINE and not rest.endswith(b"\n"):
            rest = file.readline(LONGEST_LINE)
        if len(line) < LONGEST_LINE and not line.strip():
            continue
        row = _decode(line)
        has_checksum = row is not None and row.pop("crc32", None) is not None
        if checked and not has_checksum:
            row = None  # lines of an earlier version come before those with a checksum
        checked = checked or has_checksum
        yield line, row


def _decode(line: bytes) -> Row | None:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not all(map(_is_value, row.values())):
        return None
    step, loss = row.get("step"), row.get("loss")
    if type(step) is not int or step < 0 or not isinstance(row.get("kind"), str):
        return None
    if isinstance(loss, str):
        return None
    body = {name: value for name, value in row.items() if name != "crc32"}
    return row if row.get("crc32") in (None, _checksum(body)) else None


def _is_value(value: Any) -> bool:
    if type(value) is int:
        return abs(value) < 2**63
    return value is None or type(value) in (float, str)


def _checksum(row: Row) -> str:
    return f"{zlib.crc32(json.dumps(row).encode()):08x}"
