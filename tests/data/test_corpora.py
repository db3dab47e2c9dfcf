"""Sources: files that are found, formats that are read (Parquet last), errors of one line."""

import codecs
import collections
import gzip
import importlib.util
import itertools
import json
import logging
import os
import shutil
import subprocess
import sysconfig
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet
from small_data import read_all, records, write

from simplernn_jax.config import DataConfig
from simplernn_jax.data import open_corpus, prepare_corpus
from simplernn_jax.data.documents import PIECE_SIZE
from simplernn_jax.errors import UserError

TEXT = "première ligne\r\n" + "".join(f"line {n * 7919 % 1000}\n" for n in range(500))
RECORDS = records(*({"text": line} for line in TEXT.splitlines()))


def zstd(content):
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


COMPRESS = {".gz": gzip.compress, ".zst": zstd}


def test_stdlib_is_large_sorted_and_without_tests_and_installed_packages():
    corpus = open_corpus(DataConfig())
    names = [*dict.fromkeys(name for name, _ in corpus.pieces())]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & {*Path(name).parts}]
    assert corpus.total_bytes > 5e6


def test_a_library_file_that_is_not_utf8_does_not_stop_the_default_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    write(tmp_path / "a.py", b"# coding: latin-1\ncaf\xe9\n")
    assert read_all("stdlib") == {"a.py": "# coding: latin-1\ncaf\ufffd\n"}
    with pytest.raises(UserError, match=r"a\.py: invalid UTF-8 at byte 21"):
        read_all(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.txt", "première ligne\r\nsecond\n\nлast", ["première ligne\r\nsecond\n\nлast"]),
        ("a.txt", b"\xef\xbb\xbfhi", ["hi"]),  # a byte order mark is left out
        ("a.jsonl", b'\xef\xbb\xbf{"text": "hi"}', ["hi"]),
        ("a.csv", b"\xef\xbb\xbftext\nhi\n", ["hi"]),
        ("a.tsv", b"id\ttext\n1\thi\n", ["hi"]),
        ("a.txt", codecs.BOM_UTF16_LE + "hi—\n🙂".encode("utf-16-le"), ["hi—\n🙂"]),
        ("a.jsonl", '{"text": "é"}\n{"text": "b"}'.encode("utf-16"), ["é", "b"]),
        ("a.jsonl", records({"text": "ä\n", "bot": ""}, {"text": ""}), ["ä\n"]),
        ("a.json", records({"text": "a"}, {"text": "b"}), ["a", "b"]),
        ("a.json", "[]\n", []),
    ],
)
def test_text_is_unchanged(tmp_path, name, content, texts):
    assert [*read_all(write(tmp_path / name, content)).values()] == texts


def test_folder_is_recursive_sorted_and_without_what_is_no_text(tmp_path, caplog):
    write(tmp_path / "in" / "b.txt", "b")
    write(tmp_path / "in" / "a" / "deep" / "c.md", "c")
    write(tmp_path / "in" / ".git" / "config", "hidden")
    write(tmp_path / "in" / ".hidden", "hidden")
    write(tmp_path / "in" / "picture.png", b"\x89PNG\r\n\x1a\n\0\0\0")
    write(tmp_path / "elsewhere" / "d.txt", "d")
    (tmp_path / "in" / "to").symlink_to("../elsewhere")
    source = str(tmp_path / "in")
    prepare_corpus(DataConfig(source=source), 0, str(tmp_path / "in" / "run" / "tokens"))
    assert list(read_all(source).items()) == [("a/deep/c.md", "c"), ("b.txt", "b")]
    assert "2 binary file or linked folders left out, such as" in caplog.text


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_git_work_tree_is_read_by_its_tracked_files(tmp_path, monkeypatch, caplog):
    repository, ran = tmp_path / "repository", tmp_path / "ran"
    names = ["a ü.py", "notes.txt", "src/b.py", "src/build/c.py"]
    for name in names:
        write(repository / name, name)
    # A repository of somebody else can name programs for git to run.
    program = write(tmp_path / "program", f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    for call in (["init"], ["add", "a ü.py", "src/b.py"], ["config", "core.fsmonitor", program]):
        subprocess.run(["git", "-C", repository, *call], check=True, capture_output=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    caplog.set_level("INFO")
    assert [*read_all(repository)] == ["a ü.py", "src/b.py"]
    assert "2 untracked, generated, minified or lock files left out, such as " in caplog.text
    assert [*read_all(repository / "src")] == ["b.py"]
    assert [*read_all(repository, all_files=True)] == names
    assert [*read_all(repository / "src" / "build")] == ["c.py"]
    assert not ran.exists()
    (repository / ".git" / "HEAD").write_text("")
    assert [*read_all(repository)] == names
    monkeypatch.setenv("PATH", "")
    assert [*read_all(repository)] == names
    for problem in ("it tracks nothing here", "fatal: ", "[Errno 2] No such file or directory: "):
        assert f"git has a repository here: {problem}" in caplog.text


def test_generated_files_of_a_folder_are_left_out(tmp_path, caplog):
    kept = {"a.py": "# Do not edit this by hand\n", "b.js": "x = 1\n" * 999, "c.txt": "x " * 9999}
    kept["e.py"] = "x\n" * 500 + "# DO NOT EDIT\n"
    generated = dict.fromkeys(["uv.lock", "package-lock.json", "a.min.js", "a.js.map"], "x")
    generated |= {"f_pb2.py": "x", "g.go": "// Code generated by h. DO NOT EDIT.\n"}
    generated |= {"i.css": "a{b:c}" * 999, "j.py": "# @generated\n"}
    for name, text in (kept | generated).items():
        write(tmp_path / "in" / name, text)
    caplog.set_level("INFO")
    assert read_all(tmp_path / "in") == kept
    assert "8 untracked, generated, minified or lock files left out, such as " in caplog.text
    assert read_all(tmp_path / "in", all_files=True) == kept | generated
    assert read_all(tmp_path / "in" / "*.*") == kept | generated
    write(tmp_path / "talks" / "d.jsonl", '{"text": "DO NOT EDIT"}\n')
    assert read_all(tmp_path / "talks") == {"d.jsonl:1": "DO NOT EDIT"}
    path = write(tmp_path / "locks" / "uv.lock", "x")
    assert read_all(path) == {"uv.lock": "x"}
    with pytest.raises(UserError, match=r"no text file .* or set config\.data\.all_files=True"):
        read_all(path.parent)


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "a")
    scandir = os.scandir

    def fail(path):
        if str(path) == str(tmp_path):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(UserError, match="Permission denied; correct it, or select"):
        open_corpus(DataConfig(source=str(tmp_path)))


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*", "d.txt link.txt"),
        ("**", "a/[x].txt a/b.txt a/b/c.txt d.txt link.txt"),
        ("*/*.txt", "a/[x].txt a/b.txt link/c.txt"),
        ("a/[[]x].txt", "[x].txt"),
        ("a/.h/*", "c.txt"),
        (".*", ".e.txt"),
    ],
)
def test_glob(tmp_path, monkeypatch, pattern, found):
    for name in ("a/b/c.txt", "a/.h/c.txt", "a/b.txt", "d.txt", ".e.txt", "a/[x].txt"):
        write(tmp_path / name, "x")
    (tmp_path / "link").symlink_to("a/b")
    (tmp_path / "a" / "b" / "up").symlink_to("..")
    (tmp_path / "link.txt").symlink_to("d.txt")
    monkeypatch.chdir(tmp_path)
    for absolute in (pattern, f"{tmp_path}/{pattern}"):
        assert sorted(read_all(absolute)) == found.split()


def test_output_folders_are_no_part_of_a_folder_or_glob(tmp_path, monkeypatch):
    for name in ("a.txt", "sub/b.txt", "sub/run/c.txt", "sub/run/texts/d.txt", "running/e.txt"):
        write(tmp_path / name, name)

    def names(source: str, exclude: str = "sub/run") -> list[str]:
        corpus = open_corpus(DataConfig(source=source), [exclude])
        return [name for name, _ in corpus.pieces()]

    monkeypatch.chdir(tmp_path)
    assert names(".") == names("**/*.txt") == ["a.txt", "running/e.txt", "sub/b.txt"]
    assert names("sub", str(tmp_path / "sub" / "run")) == ["b.txt"]
    # Files that are named themselves, below such a folder or beside its files, are meant.
    assert names("sub/run/texts") == names("sub/run/texts/*.txt") == ["d.txt"]
    assert names("sub/run/*.txt") == ["c.txt"]
    assert names("a.txt", ".") == names("*.txt", ".") == ["a.txt"]
    with pytest.raises(UserError, match=r"^\.: the run itself writes into this folder; write"):
        names(".", str(tmp_path))


def test_only_regular_files_are_opened(tmp_path):
    path = write(tmp_path / "a.txt", "a")
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "c.txt").symlink_to("/dev/zero")
    (tmp_path / "d.txt").symlink_to("d.txt")
    for source in (tmp_path, tmp_path / "*.txt", tmp_path / "**"):
        assert read_all(source) == {"a.txt": "a"}
    for source in (tmp_path / "b.txt", tmp_path / "c.txt", "/dev/null"):
        with pytest.raises(UserError, match=f"{source}: not a regular file"):
            read_all(source)
    corpus = open_corpus(DataConfig(source=str(path)))
    path.unlink()
    with pytest.raises(UserError, match=r"a\.txt: No such file"):
        list(corpus.pieces())


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("~nosuchuser/a.txt", "no such file or folder"),
        ("a\0*", "no path holds a NUL"),
        ("hf://datasets/user/name", "hf download --repo-type dataset USER/NAME"),
        ("https://example.org/a.txt", "fetch a file yourself"),
        ("nowhere.txt", r"^nowhere\.txt: no such file or folder"),
        ("folder", "no text file in this folder"),
        ("tfds:lm1b:1.1.0", r"not prepared in .*build_tfds\.py.*need TensorFlow"),
        ("tfds:~nosuchuser", "not prepared"),
    ],
)
def test_a_source_without_text_is_one_line(tmp_path, monkeypatch, source, problem):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", "~nosuchuser")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=problem) as raised:
        open_corpus(DataConfig(source=source))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("line_length", [97, 3 * PIECE_SIZE])
def test_large_file_comes_in_pieces_cut_at_line_ends_where_possible(tmp_path, line_length):
    line = "é" * (line_length // 2) + "\n"
    text = line * (5 * PIECE_SIZE // len(line.encode()) + 1)
    path = write(tmp_path / "a.txt", text)
    pieces = [piece.text for _, piece in open_corpus(DataConfig(source=str(path))).pieces()]
    assert "".join(pieces) == text
    assert len(pieces) >= 5
    assert max(map(len, pieces)) <= 2 * PIECE_SIZE
    if line_length < PIECE_SIZE:
        assert all(piece.endswith("\n") for piece in pieces)


@pytest.mark.parametrize("end", [b"\xe9t\xe9", "é".encode()[:1]])
@pytest.mark.parametrize("before", [5, PIECE_SIZE - 1, PIECE_SIZE])
def test_invalid_utf8_is_named_or_replaced(tmp_path, before, end):
    path = write(tmp_path / "a.txt", b"a" * before + end)
    problem = rf"a\.txt: invalid UTF-8 at byte {before};.*encoding_errors=replace"
    with pytest.raises(UserError, match=problem):
        read_all(path)
    data = b"a" * before + "é".encode() + end
    text = read_all(write(path, data), encoding_errors="replace")["a.txt"]
    assert text == data.decode("utf-8", "replace")


def test_utf16_is_decoded_over_blocks_and_its_errors_are_named_or_replaced(tmp_path):
    text = "é🙂\r\n" * 100_000
    path = write(tmp_path / "in" / "a.txt", text.encode("utf-16"))
    assert read_all(tmp_path / "in") == {"a.txt": text}  # with a NUL in every second byte
    path.write_bytes("a\ud83db".encode("utf-16", "surrogatepass") + b"!")
    with pytest.raises(UserError, match=r"a\.txt: invalid UTF-16 \(.*encoding_errors=replace"):
        read_all(path)
    assert read_all(path, encoding_errors="replace") == {"a.txt": "a\ufffdb\ufffd"}


def test_jsonl_field_is_the_document_and_blank_lines_are_skipped(tmp_path):
    content = records({"user": "", "bot": "ä\n"}, {"bot": ""}) + "\n" + records({"bot": "b"})
    path = write(tmp_path / "a.jsonl", content)
    assert read_all(path, field="bot") == {"a.jsonl:1": "ä\n", "a.jsonl:4": "b"}
    path = write(tmp_path / "a.jsonl", b'{"text": "\xff"}\n{"text": "\\ud83d!"}\n')
    assert [*read_all(path, encoding_errors="replace").values()] == ["\ufffd", "\ufffd!"]


BEFORE_AND_AFTER = {
    "a.jsonl": (b'{"text": "a"}\n\n', b'{"text": "b"}\n'),
    "a.csv": (b"id,text\n1,a\n", b"1,b\n"),
}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": ', "not JSON"),
        (b'{"txt": "a", "id": 3}', "no field 'text'; it has txt, id: name the one"),
        (b'{"id": 1, "messages": []}', "no field 'text'; it has id, messages; conversations need"),
        (b'{"text": 3}', "field 'text' is of type int, not text"),
        (b'{"text": "\xff"}', "field 'text' holds half a surrogate pair or invalid UTF-8"),
        (b"1", "field 'text' is of type NoneType, not text"),
        (b"1,b,c,d", "invalid CSV .more values than the header has names"),
        (b"1,\xff", "field 'text' holds half a surrogate pair or invalid UTF-8"),
    ],
)
def test_a_malformed_record_is_named_or_skipped(tmp_path, caplog, line, problem):
    name = "a.csv" if line.startswith(b"1") else "a.jsonl"
    before, after = BEFORE_AND_AFTER[name]
    path = write(tmp_path / name, before + line.strip() + b"\n" + after)
    with pytest.raises(UserError, match=rf"{name}:3: .*{problem}.*max_malformed_rec") as raised:
        read_all(path)
    assert "\n" not in str(raised.value)
    corpus = open_corpus(DataConfig(source=str(path), max_malformed_records=1))
    for _ in range(2):
        assert [piece.text for _, piece in corpus.pieces()] == ["a", "b"]
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert f"1 malformed record skipped, the first: {path}:3: " in warning.message


@pytest.mark.parametrize("indent", [None, 1])
def test_each_record_of_a_json_array_is_a_document(tmp_path, indent):
    array = [{"id": 1, "text": "ä\n"}, {"text": ""}, {"txt": "b"}, 3]
    path = write(tmp_path / "a.JSON.gz", gzip.compress(json.dumps(array, indent=indent).encode()))
    found = read_all(path, max_malformed_records=2)
    assert found == {"a.JSON.gz[0]": "ä\n"}
    with pytest.raises(UserError, match=r"a\.JSON\.gz\[2\]: no field 'text'; it has txt"):
        read_all(path)
    write(tmp_path / "a.json", '[\n{"text": "a"},\n{"text"')
    with pytest.raises(UserError, match=r"a\.json\[0\]: not JSON \(.* line 3"):
        read_all(tmp_path / "a.json")


def test_csv_rows_are_documents_by_the_name_of_their_column(tmp_path):
    content = 'id, bot ,"note"\r\n1,"ä, ""b""\r\nc",x\r\n\r\n2,,y\r\n3,d,\r\n'
    path = write(tmp_path / "a.csv", content)
    expected = {"a.csv:3": 'ä, "b"\r\nc', "a.csv:6": "d"}
    assert read_all(path, field=" bot ") == expected
    for delimiter in "\t;":
        rows = ("text", "a b"), ("c;\t,d", "e")
        lines = [delimiter.join(f'"{value}"' for value in row) for row in rows]
        path = write(tmp_path / "a.csv", "\n".join(lines))
        assert read_all(path) == {"a.csv:2": "c;\t,d"}
    path = write(tmp_path / "a.tsv", 'text\ta,b,c\n"d\te\n')
    assert read_all(path) == {"a.tsv:2": '"d'}


def test_json_and_csv_beside_text_are_text(tmp_path):
    write(tmp_path / "a.py", "import json")
    write(tmp_path / "b.json", '{"name": 1}')
    write(tmp_path / "c.csv", "a,b\n")
    assert read_all(tmp_path) == {"a.py": "import json", "b.json": '{"name": 1}', "c.csv": "a,b\n"}
    with pytest.raises(UserError, match=r"both csv \(c\.csv\) and jsonl \(b\.json\) and text"):
        read_all(tmp_path, field="name")


def test_an_endless_line_row_or_array_is_rejected_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("simplernn_jax.data.record_files.MAX_RECORD_BYTES", 1 << 20)
    array = json.dumps([{"text": "a\n"}] * (1 << 16), indent=2)
    for name, content, problem in (
        ("a.jsonl", json.dumps([{"text": "a" * (1 << 20)}]), ":1: a record of more than 1 MiB; "),
        ("a.json", array, ": an array of more than 1 MiB; .*jq -c"),
        ("a.csv", 'text,n\n"a' + "\nb" * (1 << 19), ": a row of more than 1 MiB"),
        ("b.csv", "text" + "\n,".join(["a" * (1 << 19)] * 3), ": a row of more than 1 MiB"),
    ):
        with pytest.raises(UserError, match=rf"{name}{problem}"):
            read_all(write(tmp_path / name, content))
    longest = json.dumps({"text": "a" * ((1 << 20) - 12)})
    assert len(longest) == 1 << 20
    assert len(read_all(write(tmp_path / "b.jsonl", longest))) == 1


def test_fingerprint_follows_the_files_and_not_their_folder(tmp_path):
    def fingerprint(folder: str, **settings) -> str:
        return open_corpus(DataConfig(source=str(tmp_path / folder), **settings)).fingerprint()

    path = write(tmp_path / "one" / "a.txt", "text")
    before = fingerprint("one")
    (tmp_path / "one").rename(tmp_path / "two")
    assert fingerprint("two") == before
    path = write(tmp_path / "two" / "a.txt", "longer")
    longer = fingerprint("two")
    assert longer != before
    path.rename(path.with_name("b.txt"))
    assert fingerprint("two") != longer
    write(tmp_path / "j" / "a.jsonl", records({"text": "a"}))
    assert fingerprint("j") != fingerprint("j", field="bot")


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("parts", [1, 3])
def test_compressed_text_is_that_of_the_file_itself(tmp_path, suffix, parts):
    content = TEXT.encode()
    cuts = [len(content) * n // parts for n in range(parts + 1)]
    blocks = [content[a:b] for a, b in itertools.pairwise(cuts)]
    path = tmp_path / f"a.txt{suffix.upper()}"
    path.write_bytes(b"".join(map(COMPRESS[suffix], blocks)))
    assert read_all(path) == {path.name: TEXT}


def test_the_name_without_the_suffix_of_compression_names_the_format(tmp_path):
    write(tmp_path / "a.txt.gz", gzip.compress(b"a"))
    write(tmp_path / "b.zst", zstd(b"b"))
    write(tmp_path / "c.txt", b"c")
    write(tmp_path / "d.gz", gzip.compress(b"\0binary"))
    write(tmp_path / "e.zst", b"")
    assert read_all(tmp_path) == {"a.txt.gz": "a", "b.zst": "b", "c.txt": "c"}
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(RECORDS.encode()))
    assert list(read_all(path).values()) == TEXT.splitlines()


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.zst"])
def test_a_damaged_archive_is_rejected_in_one_line(tmp_path, name):
    """`scripts/stress.py fuzz` damages all formats in more ways."""
    content = COMPRESS[Path(name).suffix](RECORDS.encode())
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 4
    for damaged in (content[:-1], content[:101], content[:1], bytes(flipped)):
        with pytest.raises(UserError, match=rf"{name}: corrupted or truncated \(.*intact copy"):
            read_all(write(tmp_path / name, damaged))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_large_decompressed_content_takes_bounded_memory(tmp_path, suffix):
    size = 1 << 26
    path = tmp_path / f"a.txt{suffix}"
    opened = {".gz": gzip.open, ".zst": zstandard.open}[suffix]
    with opened(path, "wb") as stream:
        for _ in range(size >> 20):
            stream.write(b"a" * (1 << 20))
    tracemalloc.start()
    try:
        corpus = open_corpus(DataConfig(source=str(path), max_expansion=1 << 20))
        count = sum(len(piece.text) for _, piece in corpus.pieces())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == size
    assert peak < size / 2


@pytest.mark.parametrize(
    ("name", "begin", "middle", "end"),
    [
        ("a.txt", b"", b"a" * 99 + b"\n", b""),
        ("a.csv", b'text\n"', b"a" * 99 + b"\n", b'"\n'),  # one row
        ("a.json", b"[", b"{}," * 99 + b"\n", b"{}]"),
        ("a.jsonl", b"", b" " * 99 + b"\n", b""),
    ],
)
def test_everything_that_is_decompressed_counts_as_expansion(tmp_path, name, begin, middle, end):
    """Also what is no text, and before it is parsed."""

    def read(size):
        content = begin + middle * (size // len(middle)) + end
        path = write(tmp_path / f"{name}.zst", zstd(content))
        settings = {"max_expansion": 10, "max_malformed_records": 1 << 30}
        collections.deque(open_corpus(DataConfig(source=str(path), **settings)).records(), 0)

    read(1 << 19)  # less than 1 MiB may expand by any factor
    with pytest.raises(UserError, match=r"expands to more than 10 times .*data\.max_expansion"):
        read(1 << 21)


TEXTS = ["first — ä\n", "", "second", *(f"line {n * 7919 % 1000}\n" for n in range(50))]


def write_table(path, columns, **settings):
    parquet.write_table(pa.table(columns), path, **settings)
    return path


@pytest.mark.parametrize(
    "column",
    [
        pa.array(TEXTS),
        pa.array([text.encode() for text in TEXTS], pa.binary_view()),
        pa.array(TEXTS).dictionary_encode(),
    ],
)
def test_rows_come_in_order_from_any_column_of_text(tmp_path, column):
    columns = {"id": range(len(TEXTS)), "book": column}
    path = write_table(tmp_path / "a.PARQUET", columns, row_group_size=7)
    assert read_all(path, field="book") == {
        f"a.PARQUET: row {n}": text for n, text in enumerate(TEXTS) if text
    }
    with pytest.raises(UserError, match=r"a\.PARQUET: no field 'text'; it has id, book: name"):
        read_all(path)


@pytest.mark.parametrize("kind", [pa.binary(), pa.string()], ids=str)
def test_rows_without_text_are_malformed_records(tmp_path, kind):
    values = pa.array([b"a", None, b"\xff", b"b"]).view(kind)
    path = write_table(tmp_path / "a.parquet", {"text": values})
    with pytest.raises(UserError, match=r"a\.parquet: row 1: field 'text' is of type NoneType"):
        read_all(path)
    with pytest.raises(UserError, match=r"row 2: .*or invalid UTF-8.*record 2, 1 allow"):
        read_all(path, max_malformed_records=1)
    texts = read_all(path, max_malformed_records=1, encoding_errors="replace")
    assert [*texts.values()] == ["a", "\ufffd", "b"]


def test_a_missing_pyarrow_is_named(tmp_path, monkeypatch):
    path = write_table(tmp_path / "a.parquet", {"text": TEXTS})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"a\.parquet: reading Parquet needs pyarrow; install it"):
        open_corpus(DataConfig(source=str(path)))


def test_a_column_that_expands_is_rejected_before_it_is_read(tmp_path):
    columns = {"text": ["x" * (1 << 22)] * 3}
    path = write_table(tmp_path / "a.parquet", columns, compression="zstd", use_dictionary=False)
    assert len(read_all(path, max_expansion=10**6)) == 3
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(100) + content[104:])  # no page can be read
    with pytest.raises(UserError, match="not a whole Parquet file"):
        read_all(path, max_expansion=10**6)
    with pytest.raises(UserError, match=r"a\.parquet: it expands to more than 1,000 times"):
        read_all(path)


def test_rows_that_repeat_a_value_expand_it(tmp_path, monkeypatch):
    """Their column is small, also after decompression: a dictionary and run lengths."""
    path = write_table(tmp_path / "a.parquet", {"text": ["x" * 20_000] * 2_000}, compression="none")
    with pytest.raises(UserError, match="expands to more than 1,000 times"):
        read_all(path)
    monkeypatch.setattr("simplernn_jax.data.record_files.MAX_RECORD_BYTES", 19_999)
    with pytest.raises(UserError, match=r"a\.parquet: row 0: a text of more than"):
        read_all(path, max_expansion=10**6)
