"""Parts of a corpus: consecutive pieces of text that one process tokenizes into files of its own.

NUMBER.tokens   token ids of the part, BOS and EOS of its documents included
NUMBER.pieces   `Columns` of each piece, int64 [pieces, 5]
NUMBER.json     sizes and SHA-256 of both, and the records that were skipped, sealed; written last,
                so that a part is whole or missing

The cuts follow from the text alone, and so do the files, whichever process writes them.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simplernn_jax.data.documents import BadRecord, Corpus
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.files import open_file, read_sealed, replaced_file, write_file, write_sealed

PART_CHARACTERS = 1 << 23
"""Characters of a part, or bytes of records, which a process holds in memory."""
_ITEM_CHARACTERS = 64
"""Added for each item, since short ones take more memory than their text."""

TOKEN_DTYPES = ("|u1", "<u2", "<u4")
"""Dtypes of stored token ids, narrowest first."""


def token_dtype(vocab_size: int) -> np.dtype:
    """Smallest unsigned dtype that holds every id."""
    return next(
        dtype for dtype in map(np.dtype, TOKEN_DTYPES) if vocab_size <= np.iinfo(dtype).max + 1
    )


class Columns(NamedTuple):
    """Pieces of a part as written to a file; each an int64 [pieces]."""

    tokens: np.ndarray
    """Number of tokens, BOS and EOS not included."""
    num_bytes: np.ndarray
    """UTF-8 bytes, 0 if it is no target."""
    is_target: np.ndarray
    begins: np.ndarray
    ends: np.ndarray


def cut_into_parts(corpus: Corpus, on_progress: Callable[[int], None]) -> Iterator[list[Any]]:
    """Cut a corpus into lists of its `Corpus.items`."""
    part: list[Any] = []
    size = 0
    for item, characters in corpus.items():
        part.append(item)
        size += characters + _ITEM_CHARACTERS
        on_progress(corpus.bytes_read)
        if size >= PART_CHARACTERS:
            yield part
            part, size = [], 0
    if part:
        yield part


def write_part(
    folder: Path, number: int, part: list[Any], corpus: Corpus, tokenizer: Tokenizer
) -> None:
    """Tokenize a part and write its files; a document without text is left out.

    Raises:
      UserError: the tokenizer cannot encode it.
      OSError: the disk is full or not writable.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    bos, eos = (np.array([x], dtype).tobytes() for x in (tokenizer.bos_id, tokenizer.eos_id))
    rows, problems = [], []
    digest = hashlib.sha256()
    with replaced_file(part_path(folder, number, "tokens"), durable=False) as stream:
        for entries in corpus.entries(part):
            if isinstance(entries, BadRecord):
                problems.append(str(entries))
                continue
            for text, is_target, begins, ends in entries:
                ids = tokenizer.encode(text)
                size = len(text) if text.isascii() else len(text.encode("utf-8"))
                rows.append((len(ids), size if is_target else 0, is_target, begins, ends))
                data = ids.astype(dtype).tobytes()
                data = b"".join((bos if begins else b"", data, eos if ends else b""))
                digest.update(data)
                stream.write(data)
        num_bytes = stream.tell()
    table = np.array(rows, "<i8").tobytes()
    write_file(part_path(folder, number, "pieces"), table, durable=False)
    record = {
        "tokens": [num_bytes, digest.hexdigest()],
        "pieces": [len(table), hashlib.sha256(table).hexdigest()],
        "bad_records": problems,
    }
    body = json.dumps(record) + "\n"
    write_sealed(part_path(folder, number, "json"), body, durable=False)


def has_part(folder: Path, number: int) -> bool:
    """Return whether the files of a part are there as they were written."""
    try:
        record = _read_record(folder, number)
        if record is None:
            return False
        for suffix in ("tokens", "pieces"):
            with open_file(part_path(folder, number, suffix)) as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                if record[suffix] != [file.tell(), found]:
                    return False
    except OSError:
        return False
    return True


def bad_records(folder: Path, number: int) -> list[str]:
    """Return the problems of a part's bad records; raises `UserError` if it was changed since."""
    record = _read_record(folder, number)
    if record is None:
        raise UserError(
            f"{part_path(folder, number, 'json')}: changed by another program; run again"
        )
    problems: list[str] = record["bad_records"]
    return problems


def _read_record(folder: Path, number: int) -> dict[str, Any] | None:
    body = read_sealed(part_path(folder, number, "json"))
    return None if body is None else json.loads(body)


def read_pieces(folder: Path, number: int) -> Columns:
    """Read the pieces of a part."""
    table = np.fromfile(part_path(folder, number, "pieces"), "<i8").reshape(
        -1, len(Columns._fields)
    )
    return Columns(*table.T)


def part_path(folder: Path, number: int, suffix: str) -> Path:
    """Path of the ``tokens``, ``pieces`` or ``json`` of a part."""
    return folder / f"{number:08}.{suffix}"
