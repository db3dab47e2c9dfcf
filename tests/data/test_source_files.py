"""Plain and compressed files give the same text, in bounded memory, or one line."""

import collections
import gzip
import itertools
import os
import tracemalloc

import pytest
import zstandard
from corpus_files import read_all, read_damaged, records, truncations, write

from simplernn_jax.config import DataConfig
from simplernn_jax.data import open_corpus
from simplernn_jax.errors import UserError

TEXT = "première ligne\r\n" + "".join(f"line {n * 7919 % 1000}\n" for n in range(500))
RECORDS = records(*({"text": line} for line in TEXT.splitlines()))


def zstd(content):
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


COMPRESS = {".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("parts", [1, 3])
def test_compressed_text_is_that_of_the_file_itself(tmp_path, suffix, parts):
    content = TEXT.encode()
    cuts = [len(content) * n // parts for n in range(parts + 1)]
    blocks = [content[a:b] for a, b in itertools.pairwise(cuts)]
    path = tmp_path / f"a.txt{suffix.upper()}"
    path.write_bytes(b"".join(map(COMPRESS[suffix], blocks)))
    assert read_all(path) == {path.name: TEXT}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_records(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](b"\xef\xbb\xbf" + RECORDS.encode() + b"no\n"))
    (tmp_path / "b.ndjson").write_text('{"text": "b"}')
    texts = read_all(tmp_path, max_malformed_records=1)
    assert list(texts.values()) == [*TEXT.splitlines(), "b"]
    assert {f"{path.name}:2", "b.ndjson:1"} <= texts.keys()


def test_the_name_without_the_suffix_of_compression_names_the_format(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a"))
    (tmp_path / "b.zst").write_bytes(zstd(b"b"))
    (tmp_path / "c.txt").write_bytes(b"c")
    (tmp_path / "d.gz").write_bytes(gzip.compress(b"\0binary"))
    assert read_all(tmp_path) == {"a.txt.gz": "a", "b.zst": "b", "c.txt": "c"}


def test_a_skippable_frame_and_an_empty_file_have_no_text(tmp_path):
    frame = bytes.fromhex("502a4d18") + (3).to_bytes(4, "little") + b"abc"
    (tmp_path / "a.zst").write_bytes(frame + zstd(b"text") + frame)
    (tmp_path / "b.zst").touch()
    (tmp_path / "c.gz").touch()
    assert read_all(tmp_path) == {"a.zst": "text", "b.zst": "", "c.gz": ""}


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.txt.zst", "a.jsonl.zst"])
def test_every_damaged_archive_is_read_or_rejected_in_one_line(tmp_path, name):
    path = tmp_path / name
    content = (RECORDS if "jsonl" in name else TEXT).encode()
    expected = read_all(write(path, COMPRESS[path.suffix](content)))
    for texts in read_damaged(path, 100):
        assert texts in (expected, {path.name: ""})  # damage may leave nothing
    for _ in truncations(path):
        with pytest.raises(UserError, match=rf"{name}: corrupted or truncated \(.*intact copy"):
            read_all(path)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_large_decompressed_content_takes_bounded_memory(tmp_path, suffix):
    size = 1 << 27
    path = tmp_path / f"a.txt{suffix}"
    opened = {".gz": gzip.open, ".zst": zstandard.open}[suffix]
    with opened(path, "wb") as stream:
        for _ in range(size >> 20):
            stream.write(b"a" * (1 << 20))
    tracemalloc.start()
    try:
        corpus = open_corpus(DataConfig(source=str(path), max_expansion=1 << 20))
        count = sum(len(piece.text) for document in corpus.documents() for piece in document.pieces)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == size
    assert os.path.getsize(path) < size / 100
    assert peak < size / 4


def test_a_zstd_frame_with_a_large_window(tmp_path):
    settings = zstandard.ZstdCompressionParameters(window_log=28, hash_log=6, chain_log=6)
    compressor = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    path = write(tmp_path / "a.zst", compressor.compress(b"text") + compressor.flush())
    assert read_all(path) == {"a.zst": "text"}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_the_expansion_of_a_file_is_bounded(tmp_path, suffix, name):
    lines = b'{"text": "' + b"a" * 4080 + b'"}\n'
    if name == "a.csv":
        lines = b"text\n" * 800
    path = write(tmp_path / f"{name}{suffix}", COMPRESS[suffix](lines * 1000))
    assert 4_000_000 / os.path.getsize(path) > 200
    with pytest.raises(UserError, match=r"expands to more than 20 times .*data\.max_expansion"):
        read_all(path, max_expansion=20)
    assert len(read_all(path, max_expansion=40_000)) >= 1
    path.write_bytes(COMPRESS[suffix](lines * 200))  # less than 1 MiB
    assert len(read_all(path, max_expansion=1)) >= 1


@pytest.mark.parametrize(
    ("name", "begin", "middle", "end"),
    [
        ("a.csv", b"text" + b",n" * 99 + b"\n", b"," * 99 + b"\n", b""),  # rows without a character
        ("a.csv", b"text\n", b'"' + b"a" * 99 + b'",\n', b""),  # invalid rows
        ("a.csv", b'text\n"', b"a" * 99 + b"\n", b'"\n'),  # one row
        ("a.json", b"[", b"{}," * 99 + b"\n", b"{}]"),
        ("a.jsonl", b"", b" " * 99 + b"\n", b""),
    ],
)
def test_everything_that_is_decompressed_counts_as_expansion(tmp_path, name, begin, middle, end):
    """Also what is no text, and before it is parsed."""
    content = begin + middle * ((1 << 21) // len(middle)) + end
    path = write(tmp_path / f"{name}.zst", zstd(content))
    settings = {"max_expansion": 10, "max_malformed_records": 1 << 30}
    corpus = open_corpus(DataConfig(source=str(path), **settings))
    with pytest.raises(UserError, match="expands to more than 10 times"):
        collections.deque(corpus.records(), 0)
