import codecs
import errno
import glob
import gzip
import json
import os
import sysconfig
from pathlib import Path

import pytest
from absl import logging
from corpus_files import read_all, read_damaged, records, write

from simplernn_jax.config import DataConfig
from simplernn_jax.data import open_corpus, prepare_corpus
from simplernn_jax.data.documents import PIECE_SIZE
from simplernn_jax.data.file_search import matching_files
from simplernn_jax.errors import UserError


def test_stdlib_is_large_sorted_and_without_tests_and_installed_packages():
    corpus = open_corpus(DataConfig())
    names = [document.name for document in corpus.documents()]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & {*Path(name).parts}]
    assert corpus.total_bytes > 5e6


def test_a_library_file_that_is_not_utf8_does_not_stop_the_default_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    write(tmp_path / "a.py", b"# coding: latin-1\ncaf\xe9\n")
    write(tmp_path / "b.py", "é\n")
    expected = {"a.py": "# coding: latin-1\ncaf\ufffd\n", "b.py": "é\n"}
    assert read_all("stdlib") == expected
    with pytest.raises(UserError, match=r"a\.py: invalid UTF-8 at byte 21"):
        read_all(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.txt", "première ligne\r\nsecond\n\nлast", ["première ligne\r\nsecond\n\nлast"]),
        ("a.txt", b"\xef\xbb\xbfhi", ["hi"]),  # a byte order mark is left out
        ("a.jsonl", b'\xef\xbb\xbf{"text": "hi"}', ["hi"]),
        ("a.json", b'\xef\xbb\xbf[{"text": "hi"}]', ["hi"]),
        ("a.csv", b"\xef\xbb\xbftext\nhi\n", ["hi"]),
        ("a.txt", codecs.BOM_UTF16_LE + "hi—\n🙂".encode("utf-16-le"), ["hi—\n🙂"]),
        ("a.txt", codecs.BOM_UTF16_BE + "—\n".encode("utf-16-be"), ["—\n"]),
        ("a.jsonl", '{"text": "é"}\n{"text": "b"}'.encode("utf-16"), ["é", "b"]),
        ("a.json", '[{"text": "é"}]'.encode("utf-16"), ["é"]),
        ("a.csv", "id;text\n1;é\n".encode("utf-16"), ["é"]),
        ("a.jsonl", records({"text": "ä\n", "bot": ""}, {"text": ""}), ["ä\n", ""]),
    ],
)
def test_text_is_unchanged(tmp_path, name, content, texts):
    assert [*read_all(write(tmp_path / name, content)).values()] == texts


def test_folder_is_recursive_sorted_and_without_hidden_and_binary_files(tmp_path, caplog):
    write(tmp_path / "b.txt", "b")
    write(tmp_path / "a" / "deep" / "c.md", "c")
    write(tmp_path / ".git" / "config", "hidden")
    write(tmp_path / ".hidden", "hidden")
    write(tmp_path / "picture.png", b"\x89PNG\r\n\x1a\n\0\0\0")
    assert list(read_all(tmp_path).items()) == [("a/deep/c.md", "c"), ("b.txt", "b")]
    assert "1 binary file left out, such as picture.png" in caplog.text


def test_linked_folders_and_tokens_of_a_run_are_left_out(tmp_path, caplog):
    write(tmp_path / "texts" / "a.txt", "a")
    write(tmp_path / "elsewhere" / "b.txt", "b")
    (tmp_path / "texts" / "link").symlink_to("../elsewhere")
    source = DataConfig(source=str(tmp_path / "texts"))
    prepare_corpus(source, 0, str(tmp_path / "texts" / "run" / "tokens"))
    write(tmp_path / "texts" / "run" / "meta.json", "{}")
    assert read_all(tmp_path / "texts") == {"a.txt": "a", "run/meta.json": "{}"}
    assert "1 linked folder left out, such as link" in caplog.text


def test_a_folder_that_cannot_be_read_is_an_error_and_a_globs_a_warning(
    tmp_path, monkeypatch, caplog
):
    write(tmp_path / "a.txt", "a")
    write((closed := tmp_path / "closed") / "b.txt", "b")
    whole = os.scandir

    def unless_closed(path):
        if os.path.realpath(path) == str(closed):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return whole(path)

    monkeypatch.setattr(os, "scandir", unless_closed)
    with pytest.raises(UserError, match="closed: Permission denied; make this folder readable"):
        open_corpus(DataConfig(source=str(tmp_path)))
    assert read_all(f"{tmp_path}/**/*.txt") == {"a.txt": "a"}
    assert "closed: left out: Permission denied" in caplog.text
    monkeypatch.undo()
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != str(closed) and may(path, mode))
    with pytest.raises(UserError, match="closed: Permission denied; make this folder readable"):
        open_corpus(DataConfig(source=str(tmp_path)))


def test_glob_finds_what_the_standard_library_finds(tmp_path, monkeypatch):
    for name in ("a/b/c.txt", "a/.h/c.txt", "a/b.txt", "d.txt", ".e.txt", "a/[x].txt", "a/b/f"):
        write(tmp_path / name, "x")
    (tmp_path / "link").symlink_to("a/b")
    (tmp_path / "a" / "link.txt").symlink_to("../d.txt")
    monkeypatch.chdir(tmp_path)
    patterns = "* ** a/** **/*.txt **/**/c.txt */*.txt */b/* a/[[]x].txt .* ?.txt a/.h/* a/**/c.txt"
    patterns += " ./*/../d.txt no/* d.txt/* link/* **/f a/*/ a/**/ **.txt"
    for pattern in patterns.split():
        for absolute in (pattern, f"{tmp_path}/{pattern}"):
            expected = filter(os.path.isfile, glob.glob(absolute, recursive=True))
            found = map(os.path.realpath, matching_files(absolute))
            assert {*found} == {*map(os.path.realpath, expected)}, absolute
    for name in ("a\0", "\ud800"):  # no file can have these names
        assert matching_files(f"{name}/*") == matching_files(f"{name}*/**/*") == set()
        assert matching_files(f"a/{name}/**") == matching_files(f"*/{name}") == set()


def test_glob_around_links_ends(tmp_path):
    write(tmp_path / "in" / "deep" / "a.txt", "a")
    write(tmp_path / "other" / "b.txt", "b")
    for name in ("1", "2"):
        (tmp_path / "in" / name).symlink_to(".")
        (tmp_path / "in" / "deep" / name).symlink_to("..")
    (tmp_path / "in" / "other").symlink_to("../other")
    (tmp_path / "in" / "self").symlink_to("self")
    assert read_all(tmp_path / "in" / "**" / "*.txt") == {"a.txt": "a"}
    assert read_all(tmp_path / "in" / "other" / "**") == {"b.txt": "b"}
    assert read_all(tmp_path / "in" / "*" / "*" / "a.txt") == {"a.txt": "a"}
    assert read_all(tmp_path / "in") == {"deep/a.txt": "a"}


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
    for make, problem in (
        (os.mkfifo, "not a regular file; make it"),
        (Path.unlink, "No such file"),
    ):
        make(path)
        with pytest.raises(UserError, match=rf"a\.txt: {problem}"):
            [list(document.pieces) for document in corpus.documents()]
    with pytest.raises(UserError, match=r"a\.txt: No such file"):
        corpus.fingerprint()


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("x" * 5000, "File name too long"),
        ("x" * 5000 + "*", "no file matches this glob"),
        ("self", "Too many levels of symbolic links"),
        ("self/*", "no file matches this glob"),
        ("~nosuchuser/a.txt", "no such file or folder"),
        ("a\0b", "no path holds a NUL"),
        ("a\0*", "no path holds a NUL"),
        ("a.txt/b", "no such file or folder"),
        ("https://example.org/a.txt", r"download the file first, .*curl -LO, and give its path"),
        ("s3://bucket/*.txt", "download the file first"),
        ("user/data-set_1.5", "no such file or folder .*hf download --repo-type dataset USER/NAME"),
        ("hf://datasets/user/name/a.csv", "hf download --repo-type dataset USER/NAME"),
        ("<2 texts from Python>", "set data.source to these texts in Python"),
        ("\ud800", "half a surrogate pair; correct it"),
        ("a:1,\udfff:2", "half a surrogate pair; correct it"),
        ("caf\udce9.txt", "no such file or folder"),  # a byte of a file name
        ("nowhere.txt", r"^nowhere\.txt: no such file or folder"),
        ("folder", "no text file in this folder"),
        ("empty.txt", r"^empty\.txt: empty"),
        ("tfds:" + "x" * 300, "File name too long|need TensorFlow"),  # by the version of Python
        ("tfds:self", r"not prepared in .*build_tfds\.py.*need TensorFlow"),
        ("tfds:tiny_shakespeare", r"not prepared in .*build_tfds\.py.*need TensorFlow"),
        ("tfds:no/such/path", r"not prepared in .*build_tfds\.py.*need TensorFlow"),
        ("tfds:lm1b:1.1.0", r"not prepared in .*build_tfds\.py.*need TensorFlow"),
        ("tfds:~nosuchuser", "not prepared"),
        ("tfds:a\0b", "no path holds a NUL"),
    ],
)
def test_a_source_without_text_is_one_line(tmp_path, monkeypatch, source, problem):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", "~nosuchuser")
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "empty.txt", "")
    (tmp_path / "folder").mkdir()
    (tmp_path / "self").symlink_to("self")
    with pytest.raises(UserError, match=problem) as raised:
        open_corpus(DataConfig(source=source))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("source", [".", "*.txt", "a.txt", "tfds:a"])
def test_a_deleted_current_folder_is_one_line(tmp_path, monkeypatch, source):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match=r"current folder was deleted|no text file|not prepared"):
        open_corpus(DataConfig(source=source), ["run"] if source == "." else [])


@pytest.mark.parametrize("line_length", [97, 3 * PIECE_SIZE])
def test_large_file_comes_in_pieces_cut_at_line_ends_where_possible(tmp_path, line_length):
    line = "é" * (line_length // 2) + "\n"
    text = line * (5 * PIECE_SIZE // len(line.encode()) + 1)
    path = write(tmp_path / "a.txt", text)
    (document,) = open_corpus(DataConfig(source=str(path))).documents()
    pieces = [piece.text for piece in document.pieces]
    assert "".join(pieces) == text
    assert len(pieces) >= 5
    assert max(map(len, pieces)) <= 2 * PIECE_SIZE
    if line_length < PIECE_SIZE:
        assert all(piece.endswith("\n") for piece in pieces)


@pytest.mark.parametrize("end", [b"\xe9t\xe9", "é".encode()[:1]])
@pytest.mark.parametrize("before", [0, 5, PIECE_SIZE - 1, PIECE_SIZE, PIECE_SIZE + 3])
def test_invalid_utf8_is_named_or_replaced(tmp_path, before, end):
    path = write(tmp_path / "a.txt", b"a" * before + end)
    problem = rf"a\.txt: invalid UTF-8 at byte {before};.* encoding_errors=replace"
    with pytest.raises(UserError, match=problem):
        read_all(path)
    data = b"a" * before + "é".encode() + end
    text = read_all(write(path, data), encoding_errors="replace")["a.txt"]
    assert text == data.decode("utf-8", "replace")


def test_jsonl_field_is_the_document_and_blank_lines_are_skipped(tmp_path):
    content = records({"user": "", "bot": "ä\n"}, {"bot": ""}) + "\n" + records({"bot": "b"})
    path = write(tmp_path / "a.jsonl", content)
    assert read_all(path, field="bot") == {"a.jsonl:1": "ä\n", "a.jsonl:2": "", "a.jsonl:4": "b"}


def test_output_folders_are_no_part_of_a_folder_or_glob(tmp_path, monkeypatch):
    for name in ("a.txt", "sub/b.txt", "sub/run/c.txt", "sub/run/texts/d.txt", "running/e.txt"):
        write(tmp_path / name, name)

    def names(source: str, exclude: str = "sub/run") -> list[str]:
        return [d.name for d in open_corpus(DataConfig(source=source), [exclude]).documents()]

    monkeypatch.chdir(tmp_path)
    assert names(".") == names("**/*.txt") == ["a.txt", "running/e.txt", "sub/b.txt"]
    assert names("sub", str(tmp_path / "sub" / "run")) == ["b.txt"]
    # Files that are named themselves, below such a folder or beside its files, are meant.
    assert names("sub/run/texts") == names("sub/run/texts/*.txt") == ["d.txt"]
    assert names("sub/run/*.txt") == ["c.txt"]
    assert names("a.txt", ".") == names("*.txt", ".") == ["a.txt"]
    with pytest.raises(UserError, match=r"^\.: the run itself writes into this folder; choose"):
        names(".", str(tmp_path))


BEFORE_AND_AFTER = {
    "a.jsonl": (b'{"text": "a"}\n\n', b'{"text": "b"}\n'),
    "a.csv": (b"id,text\n1,a\n", b"1,b\n"),
}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": ', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["text"]', "of type list, not an object"),
        (b'{"txt": "a", "id": 3}', "no field 'text'; did you mean 'txt'\\?; it has txt, id"),
        (b"{}", "it has none"),
        (b'{"\\u001b[31m": 1}', r"it has \\x1b\[31m: name"),
        (b'{"id": 1, "messages": []}', "no field 'text' but 'messages'; conversations need"),
        (b'{"conversations": []}', "no field 'text' but 'conversations'; conversations need"),
        (b'{"text": 3}', "field 'text' is of type int, not text"),
        (b'{"text": "\xff"}', "invalid UTF-8 at byte 10;"),
        (b'{"text": "\\ud83d"}', "half a surrogate pair"),
        # Only the first of many fields are named.
        (records({f"txt{n}\x1b": n for n in range(50_000)}).encode(), "did you mean 'txt7"),
        (b"1", "field 'text' is of type NoneType, not text"),
        (b"1,b,c,d", "invalid CSV .more values than the header has names"),
        (b'1,"b"c', "invalid CSV ."),
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
    assert [*read_all(path, max_malformed_records=1).values()] == ["a", "b"]
    assert "1 malformed record skipped, the first: " in caplog.text


def test_utf16_is_decoded_over_blocks_and_its_errors_are_named_or_replaced(tmp_path):
    text = "é🙂\r\n" * 100_000
    path = write(tmp_path / "in" / "a.txt", text.encode("utf-16"))
    assert read_all(tmp_path / "in") == {"a.txt": text}  # with a NUL in every second byte
    path.write_bytes("a\ud83db".encode("utf-16", "surrogatepass") + b"!")
    with pytest.raises(UserError, match=r"a\.txt: invalid UTF-16 \(.*encoding_errors=replace"):
        read_all(path)
    assert read_all(path, encoding_errors="replace") == {"a.txt": "a\ufffdb\ufffd"}


@pytest.mark.parametrize("name", ["a.json", "a.JSON.gz"])
def test_each_record_of_a_json_array_is_a_document(tmp_path, name):
    array = [{"id": 1, "text": "ä\n"}, {"text": ""}, {"text": "b"}]
    for indent in (None, 1):
        content = f"\n {json.dumps(array, indent=indent)}\n".encode()
        path = write(tmp_path / name, gzip.compress(content) if "gz" in name else content)
        places = [f"{name}[{number}]" for number in range(3)]
        assert read_all(path) == dict(zip(places, ["ä\n", "", "b"], strict=True))


def test_json_of_one_object_or_of_lines(tmp_path):
    path = write(tmp_path / "a.json", json.dumps({"text": "a"}, indent=1))
    assert read_all(path) == {"a.json[0]": "a"}
    assert read_all(write(path, records({"text": "a"}, {"text": "b"}))) == {
        "a.json:1": "a",
        "a.json:2": "b",
    }
    assert read_all(write(path, "[]\n")) == {}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('[{"text": "a"}, {"txt": "b"}]', r"a\.json\[1\]: no field 'text'; did you mean 'txt'"),
        ('[{"text": "a"}, 3]', r"a\.json\[1\]: of type int, not an object"),
        ('[{"text": "a"}, {"text": null}]', r"a\.json\[1\]: field 'text' is of type NoneType"),
        ('[\n{"text": "a"},\n{"text"', r"a\.json\[0\]: not JSON \(.* line 3"),
        (b'[{"text": "a"}, {"text": "\xff"}]', r"a\.json\[0\]: invalid UTF-8 at byte 26"),
    ],
)
def test_malformed_records_of_a_json_array(tmp_path, content, problem):
    path = write(tmp_path / "a.json", content)
    with pytest.raises(UserError, match=problem):
        read_all(path)
    assert len(read_all(path, max_malformed_records=1)) == ("[1]" in problem.replace("\\", ""))


def test_csv_rows_are_documents_by_the_name_of_their_column(tmp_path):
    content = 'id, bot ,"note"\r\n1,"ä, ""b""\r\nc",x\r\n\r\n2,,y\r\n3,d,\r\n'
    path = write(tmp_path / "a.csv", content)
    expected = {"a.csv:3": 'ä, "b"\r\nc', "a.csv:5": "", "a.csv:6": "d"}
    assert read_all(path, field=" bot ") == expected
    for delimiter in "\t;":
        rows = ("text", "a b"), ("c;\t,d", "e")
        lines = [delimiter.join(f'"{value}"' for value in row) for row in rows]
        path = write(tmp_path / "a.csv", "\n".join(lines))
        assert read_all(path) == {"a.csv:2": "c;\t,d"}
    assert read_all(write(path, "text\na, b; c\n")) == {"a.csv:2": "a, b; c"}


@pytest.mark.parametrize("name", ["a.tsv", "a.TSV.gz"])
def test_quotes_of_tsv_are_text(tmp_path, name):
    content = b'id\tt;e,x;t\n1\t"a" said\n2\t"b\n"3\tc"\n'
    path = write(tmp_path / name, gzip.compress(content) if "gz" in name else content)
    texts = {f"{name}:2": '"a" said', f"{name}:3": '"b', f"{name}:4": 'c"'}
    assert read_all(path, field="t;e,x;t") == texts


def test_csv_without_the_column_or_with_an_open_quote_is_one_line(tmp_path, monkeypatch):
    path = write(tmp_path / "a.csv", "id,body\n1,a\n")
    with pytest.raises(UserError, match="no field 'text'; it has id, body: name the one with the"):
        read_all(path)
    with pytest.raises(UserError, match="unexpected end of data"):
        read_all(write(path, 'text\n"a\nb\n'))
    monkeypatch.setattr("simplernn_jax.data.record_files.MAX_RECORD_BYTES", 1 << 16)
    for row in ('"a' + "\nb" * (1 << 15), '"\n",' * (1 << 14)):
        with pytest.raises(UserError, match=r"a\.csv:\d+: a record .* than 0 MiB; split it"):
            read_all(write(path, f"text,n\n{row}"), max_malformed_records=1)
    assert len(read_all(write(path, "text\n" + f'"{"b" * 100}\n"\n' * 1000))) == 1000


def test_json_and_csv_beside_text_are_text(tmp_path):
    write(tmp_path / "a.py", "import json")
    write(tmp_path / "b.json", '{"name": 1}')
    write(tmp_path / "c.csv", "a,b\n")
    assert read_all(tmp_path) == {"a.py": "import json", "b.json": '{"name": 1}', "c.csv": "a,b\n"}
    with pytest.raises(UserError, match=r"both text \(a\.py\) and jsonl \(b\.json\)"):
        read_all(tmp_path, field="name")


@pytest.mark.parametrize(
    ("first", "second", "kinds"),
    [
        ("a.ndjson", "c.txt", ("jsonl", "text")),
        ("b.json", "c.csv", ("jsonl", "csv")),
        ("a.txt.gz", "e.JSONL.gz", ("text", "jsonl")),
        ("a.parquet", "c.txt", ("parquet", "text")),
    ],
)
def test_several_formats_in_a_folder_are_rejected(tmp_path, first, second, kinds):
    for name in (first, second):
        text = records({"text": "a"}).encode()
        write(tmp_path / name, gzip.compress(text) if name.endswith("gz") else text)
    problem = rf"both {kinds[0]} \({first}\) and {kinds[1]} \({second}\); specify one kind"
    with pytest.raises(UserError, match=problem):
        read_all(tmp_path)


def test_messages_are_not_text(tmp_path):
    path = write(tmp_path / "a.jsonl", records({"messages": [{"role": "user", "content": "a"}]}))
    with pytest.raises(UserError, match="'messages' is of type list, not text; conversations need"):
        read_all(path, field="messages")
    path = write(tmp_path / "a.jsonl", records({"messages": "already one text"}))
    assert read_all(path, field="messages") == {"a.jsonl:1": "already one text"}


def test_malformed_records_are_counted_and_warned_of_once(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", "no\n" + records({"text": "a"}) + "no\n")
    corpus = open_corpus(DataConfig(source=str(path), max_malformed_records=2))
    for _ in range(2):
        assert len(list(corpus.documents())) == 1
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "2 malformed records skipped, the first:" in warning.message
    assert "a.jsonl:1" in warning.message
    with pytest.raises(UserError, match=r"a\.jsonl:3: .*malformed record 2, 1 allowed"):
        read_all(path, max_malformed_records=1)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize("encoding_errors", ["strict", "replace"])
def test_every_damaged_file_is_read_or_rejected_in_one_line(tmp_path, name, encoding_errors):
    text = "é — \n\u2028🙂"
    content = records(*({"text": f"{text}{n}", "other": [n, {}]} for n in range(7)))
    content += json.dumps({"text": text}, ensure_ascii=False)
    settings = {"encoding_errors": encoding_errors, "max_malformed_records": 1}
    for texts in read_damaged(write(tmp_path / name, content), 200, **settings):
        "".join(texts.values()).encode("utf-8")


def test_jsonl_replaces_invalid_characters(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "\xff"}\n{"text": "\\ud83d!"}\n')
    assert [*read_all(path, encoding_errors="replace").values()] == ["\ufffd", "\ufffd!"]


def test_an_endless_line_or_array_is_rejected_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("simplernn_jax.data.record_files.MAX_RECORD_BYTES", 1 << 20)
    path = write(tmp_path / "a.jsonl", json.dumps([{"text": "a" * (1 << 20)}]))
    with pytest.raises(UserError, match=r"a\.jsonl:1: a record .* than 1 MiB; .*jq -c '\.\[\]'"):
        read_all(path)
    path = write(tmp_path / "a.json", json.dumps([{"text": "a\n"}] * (1 << 16), indent=2))
    with pytest.raises(
        UserError, match=r"a\.json:\d+: .* array of more than 1 MiB; .*jq -c '\.\[\]'"
    ):
        read_all(path)
    longest = json.dumps({"text": "a" * ((1 << 20) - 12)})
    assert len(longest) == 1 << 20
    assert len(read_all(write(tmp_path / "b.jsonl", longest))) == 1


def test_fingerprint_follows_the_files_and_not_their_folder(tmp_path):
    def fingerprint(folder: str, **settings) -> str:
        return open_corpus(DataConfig(source=str(tmp_path / folder), **settings)).fingerprint()

    path = write(tmp_path / "one" / "a.txt", "text")
    before = fingerprint("one")
    assert fingerprint("one") == before
    (tmp_path / "one").rename(tmp_path / "two")
    assert fingerprint("two") == before
    path = write(tmp_path / "two" / "a.txt", "longer")
    longer = fingerprint("two")
    assert longer != before
    path.rename(path.with_name("b.txt"))
    assert fingerprint("two") != longer
    write(tmp_path / "j" / "a.jsonl", records({"text": "a"}))
    assert fingerprint("j") != fingerprint("j", field="bot")
