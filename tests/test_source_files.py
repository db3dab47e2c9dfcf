"""Plain and compressed files give the same text, in bounded memory, or one line."""

import contextlib
import gzip
import itertools
import json
import os
import tracemalloc

import pytest
import zstandard
from damages import damaged

from simplernn_jax.config import DataConfig
from simplernn_jax.data import open_corpus
from simplernn_jax.errors import UserError

TEXT = "première ligne\r\n" + "".join(f"line {n * 7919 % 1000}\n" for n in range(500))
RECORDS = "".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines())


def zstd(content):
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


COMPRESS = {".gz": gzip.compress, ".zst": zstd}


def read(path, **settings):
    corpus = open_corpus(DataConfig(source=str(path), **settings))
    documents = {document.name: "".join(document.pieces) for document in corpus.documents()}
    assert corpus.bytes_read == corpus.total_bytes
    return documents


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("parts", [1, 3])
def test_compressed_text_is_that_of_the_file_itself(tmp_path, suffix, parts):
    content = TEXT.encode()
    cuts = [len(content) * n // parts for n in range(parts + 1)]
    blocks = [content[a:b] for a, b in itertools.pairwise(cuts)]
    path = tmp_path / f"a.txt{suffix.upper()}"
    path.write_bytes(b"".join(map(COMPRESS[suffix], blocks)))
    assert read(path) == {path.name: TEXT}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_records(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](b"\xef\xbb\xbf" + RECORDS.encode() + b"no\n"))
    (tmp_path / "b.ndjson").write_text('{"text": "b"}')
    texts = read(tmp_path, max_bad_records=1)
    assert list(texts.values()) == [*TEXT.splitlines(), "b"]
    assert {f"{path.name}:2", "b.ndjson:1"} <= texts.keys()


def test_kinds_in_a_folder_are_those_of_the_content(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a"))
    (tmp_path / "b.zst").write_bytes(zstd(b"b"))
    (tmp_path / "c.txt").write_bytes(b"c")
    (tmp_path / "d.gz").write_bytes(gzip.compress(b"\0binary"))
    assert read(tmp_path) == {"a.txt.gz": "a", "b.zst": "b", "c.txt": "c"}
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(UserError, match=r"both text \(a\.txt\.gz\) and JSONL \(e\.jsonl\.gz\)"):
        read(tmp_path)


def test_a_skippable_frame_and_an_empty_file_have_no_text(tmp_path):
    frame = bytes.fromhex("502a4d18") + (3).to_bytes(4, "little") + b"abc"
    (tmp_path / "a.zst").write_bytes(frame + zstd(b"text") + frame)
    (tmp_path / "b.zst").touch()
    (tmp_path / "c.gz").touch()
    assert read(tmp_path) == {"a.zst": "text", "b.zst": "", "c.gz": ""}


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.txt.zst", "a.jsonl.zst"])
def test_every_damaged_archive_is_read_or_refused_in_one_line(tmp_path, name):
    path = tmp_path / name
    whole = COMPRESS[path.suffix]((RECORDS if "jsonl" in name else TEXT).encode())
    path.write_bytes(whole)
    expected = read(path)
    for seed in range(100):
        path.write_bytes(damaged(whole, seed))
        with contextlib.suppress(UserError):
            assert read(path) in (expected, {path.name: ""})  # damage may leave nothing
    for size in range(1, len(whole), 101):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=rf"{name}: damaged or truncated \(.*whole copy"):
            read(path)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_what_decompresses_to_much_is_read_in_bounded_memory(tmp_path, suffix):
    size = 1 << 27
    path = tmp_path / f"a.txt{suffix}"
    opened = {".gz": gzip.open, ".zst": zstandard.open}[suffix]
    with opened(path, "wb") as stream:
        for _ in range(size >> 20):
            stream.write(b"a" * (1 << 20))
    tracemalloc.start()
    try:
        corpus = open_corpus(DataConfig(source=str(path)))
        count = sum(len(piece) for document in corpus.documents() for piece in document.pieces)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == size
    assert os.path.getsize(path) < size / 100
    assert peak < size / 4
