"""Rows of Parquet files are documents."""

import importlib.util

import pyarrow as pa
import pytest
from corpus_files import read_all, read_damaged, truncations
from pyarrow import parquet

from simplernn_jax.config import DataConfig
from simplernn_jax.data import open_corpus
from simplernn_jax.errors import UserError

TEXTS = ["first — ä\n", "", "second", *(f"line {n * 7919 % 1000}\n" for n in range(50))]


def write(path, columns, **settings):
    parquet.write_table(pa.table(columns), path, **settings)
    return path


@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS),
        pa.array(TEXTS, pa.large_string()),
        pa.array([text.encode() for text in TEXTS]),
        pa.array([text.encode() for text in TEXTS], pa.binary_view()),
        pa.array(TEXTS).dictionary_encode(),
    ],
)
def test_rows_come_in_order_from_any_column_of_text(tmp_path, column):
    columns = {"id": range(len(TEXTS)), "book": column}
    path = write(tmp_path / "a.PARQUET", columns, row_group_size=7)
    assert read_all(path, field="book") == {f"a.PARQUET: row {n}": t for n, t in enumerate(TEXTS)}


def test_rows_without_text_are_malformed_records(tmp_path):
    path = write(tmp_path / "a.parquet", {"text": pa.array([b"a", None, b"\xff", b"b"])})
    with pytest.raises(UserError, match=r"a\.parquet: row 1: field 'text' is of type NoneType"):
        read_all(path)
    with pytest.raises(UserError, match=r"row 2: invalid UTF-8 at byte 0 .*record 2, 1 allow"):
        read_all(path, max_malformed_records=1)
    texts = read_all(path, max_malformed_records=1, encoding_errors="replace")
    assert [*texts.values()] == ["a", "\ufffd", "b"]


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"txt": ["a"], "id": [1]}, r"no field 'text'; it has txt, id: name"),
        ({"text": [1]}, "row 0: field 'text' is of type int, not text"),
        ({"messages": [[{"role": "user"}]]}, "no field 'text'; it has messages; conversations"),
    ],
)
def test_a_column_without_text_is_rejected(tmp_path, columns, problem):
    with pytest.raises(UserError, match=rf"a\.parquet: {problem}"):
        read_all(write(tmp_path / "a.parquet", columns))


def test_every_damaged_file_is_read_or_rejected_in_one_line(tmp_path):
    path = write(tmp_path / "a.parquet", {"text": TEXTS}, compression="zstd")
    list(read_damaged(path, 100, max_malformed_records=3))
    for _ in truncations(path):
        with pytest.raises(UserError, match=r"a\.parquet: not a whole Parquet file \("):
            read_all(path)


def test_a_missing_pyarrow_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", {"text": TEXTS})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"a\.parquet: reading Parquet needs pyarrow; install it"):
        open_corpus(DataConfig(source=str(path)))


def test_a_column_that_expands_is_rejected_before_it_is_read(tmp_path):
    columns = {"text": ["x" * (1 << 22)] * 3}
    path = write(tmp_path / "a.parquet", columns, compression="zstd", use_dictionary=False)
    assert len(read_all(path, max_expansion=10**6)) == 3
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(100) + content[104:])  # no page can be read
    with pytest.raises(UserError, match="not a whole Parquet file"):
        read_all(path, max_expansion=10**6)
    with pytest.raises(UserError, match=r"a\.parquet: it expands to more than 1,000 times"):
        read_all(path)


def test_rows_that_repeat_a_value_expand_it(tmp_path, monkeypatch):
    """Their column is small, also after decompression: a dictionary and run lengths."""
    path = write(tmp_path / "a.parquet", {"text": ["x" * 20_000] * 2_000}, compression="none")
    with pytest.raises(UserError, match="expands to more than 1,000 times"):
        read_all(path)
    monkeypatch.setattr("simplernn_jax.data.record_files.MAX_RECORD_BYTES", 19_999)
    with pytest.raises(UserError, match=r"a\.parquet: row 0: a text of more than"):
        read_all(path, max_expansion=10**6)
