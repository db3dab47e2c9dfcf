"""Tokenized corpora on disk: splits, content, verification, and tokenization by processes."""

import csv
import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import tracemalloc
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from corrupt_files import flip_bit
from hypothesis import given
from hypothesis import strategies as st
from processes import run_python
from small_data import byte_level, contents, pretrained, stores, word_level

from simplernn_jax.config import DataConfig
from simplernn_jax.data import TokenizedCorpus, TokenSplit, load_tokenizer, prepare_corpus
from simplernn_jax.data.token_split import ConcatenatedArray
from simplernn_jax.data.token_store import find_corpus
from simplernn_jax.errors import UserError
from simplernn_jax.files import open_file, read_sealed, write_sealed

BOS, EOS = 256, 257


def write_documents(folder: Path, count: int) -> list[str]:
    """Documents of different, partly empty and non-ASCII text; return those that are not empty."""
    folder.mkdir()
    texts = [f"Dokument {i} — {'ä' * i}\n" if i % 7 else "" for i in range(count)]
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_text(text, encoding="utf-8")
    return [text for text in texts if text]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of nine documents."""
    write_documents(tmp_path / "in", 9)
    return tmp_path / "in"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def prepare(source, cache: Path, seed: int = 3, known=None, **settings) -> TokenizedCorpus:
    config = DataConfig(**settings)
    config.source = str(source) if isinstance(source, Path) else source
    return prepare_corpus(config, seed, str(cache), tokenizer=known)


def texts_of(split: TokenSplit) -> list[str]:
    """The texts of a split, after checking that each is BOS, tokens, EOS."""
    tokenizer = load_tokenizer("byte")
    texts = []
    for tokens in np.split(split.tokens, split.document_starts[1:]):
        assert (tokens[0], tokens[-1]) == (BOS, EOS)
        texts.append(tokenizer.decode(tokens[1:-1]))
    return texts


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_every_document_is_on_exactly_one_side_of_a_document_split(tmp_path, fraction, cache):
    texts = write_documents(tmp_path / "in", 53)
    corpus = prepare(tmp_path / "in", cache, validation_fraction=fraction)
    train, validation = texts_of(corpus.train), texts_of(corpus.validation)
    assert len(validation) == min(max(1, round(fraction * len(texts))), len(texts) - 1)
    assert sorted(train + validation) == sorted(texts)
    assert validation == [text for text in texts if text in validation]  # in source order
    for split, side in ((corpus.train, train), (corpus.validation, validation)):
        assert split.num_bytes == sum(len(text.encode()) for text in side)
        assert split.num_predictions == split.num_bytes + len(side)
        assert split.document_starts.dtype == np.int64
        assert split.tokens.dtype == np.uint16


def test_document_split_follows_from_the_seed(tmp_path):
    write_documents(tmp_path / "in", 53)
    first = prepare(tmp_path / "in", tmp_path / "a", seed=1, validation_fraction=0.2)
    again = prepare(tmp_path / "in", tmp_path / "b", seed=1, validation_fraction=0.2)
    other = prepare(tmp_path / "in", tmp_path / "a", seed=2, validation_fraction=0.2)
    assert first.content_hash == again.content_hash
    assert texts_of(first.train) == texts_of(again.train)
    assert texts_of(first.train) != sorted(texts_of(first.train))
    assert set(texts_of(first.validation)) != set(texts_of(other.validation))
    assert first.content_hash != other.content_hash


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 0.97])
def test_position_split_holds_out_the_end_of_the_stream(tmp_path, fraction, cache):
    texts = write_documents(tmp_path / "in", 23)
    stream = [t for text in texts for t in (BOS, *text.encode(), EOS)]
    settings = {"split": "position", "validation_fraction": fraction}
    corpus = prepare(tmp_path / "in", cache, **settings)
    assert len(corpus.validation.tokens) == max(1, round(fraction * len(stream)))
    assert [*corpus.train.tokens, *corpus.validation.tokens] == stream
    for split in (corpus.train, corpus.validation):
        starts = {0, *np.flatnonzero(split.tokens == BOS).tolist()}
        assert split.document_starts.tolist() == sorted(starts)
        assert split.num_bytes == np.count_nonzero(split.tokens < 256)
        document = np.searchsorted(split.document_starts, range(len(split.tokens)), "right")
        assert split.num_predictions == np.count_nonzero(np.diff(document) == 0)
    prepare(tmp_path / "in", cache, seed=4, **settings)
    assert len(stores(cache)) == 1  # the seed does not matter


def test_position_split_counts_bytes_of_a_vocabulary_that_loses_text(tmp_path, cache):
    word_level("alpha", "beta").save(str(tmp_path / "tokenizer.json"))
    text = "alpha   beta\n" * 100
    (tmp_path / "a.txt").write_text(text)
    known = load_tokenizer(str(tmp_path / "tokenizer.json"))
    settings = {"split": "position", "validation_fraction": 0.5}
    corpus = prepare(tmp_path / "a.txt", cache, known=known, **settings)
    assert corpus.train.tokens.dtype == np.uint8
    assert corpus.train.num_bytes + corpus.validation.num_bytes == len(text)
    assert 0.3 < corpus.train.num_bytes / len(text) < 0.7


@pytest.mark.parametrize(
    ("fraction", "held_out", "warning"),
    [
        (0.05, "5,002 validation tokens in 1 document", "fewer than 10,000 validation tokens"),
        (0.6, "10,004 validation tokens in 2 documents", ""),
        (0.0, "no validation tokens", ""),
    ],
)
def test_summary_and_warning(tmp_path, fraction, held_out, warning, cache):
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.txt").write_text("a" * 5_000)
    corpus = prepare(tmp_path / "in", cache, validation_fraction=fraction)
    assert re.fullmatch(rf"[\d,]+ training tokens in \d documents?; {held_out}", corpus.summary)
    assert corpus.warning(fraction).startswith(warning)
    assert bool(corpus.warning(fraction)) == bool(warning)
    if fraction == 0.6:  # as if little had been asked for, and a long document been drawn
        assert corpus.warning(0.05).startswith("67% of the text is held out")
    assert (corpus.validation is None) == (fraction == 0)


def test_a_single_document_is_split_by_position(tmp_path, caplog, cache):
    caplog.set_level("INFO")
    (tmp_path / "a.txt").write_text("one document " * 50)
    default = prepare(tmp_path / "a.txt", cache)
    assert "a.txt: a single document, so its end is held out" in caplog.text
    by_position = prepare(tmp_path / "a.txt", cache, split="position")
    assert by_position.content_hash == default.content_hash
    assert default.validation.num_bytes > 20
    assert prepare(tmp_path / "a.txt", cache, validation_fraction=0.0).validation is None


def test_a_source_without_text_or_that_changes_is_rejected(tmp_path, source, cache):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match=r"a\.jsonl: no text in it"):
        prepare(tmp_path / "a.jsonl", cache)
    tokenizer = load_tokenizer("byte")

    class Meddler(type(tokenizer)):
        def encode(self, text: str) -> np.ndarray:
            (source / "001.txt").write_text("more")
            return super().encode(text)

    with pytest.raises(UserError, match="changed while it was being read; run again"):
        prepare(source, cache, known=Meddler())
    assert not stores(cache)


@pytest.mark.oldest_python
@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch, tokenizer, cache):
    monkeypatch.setattr("simplernn_jax.data.tokenization.PART_CHARACTERS", 1 << 20)
    block = b"a line of a large file that is never in memory whole\n" * 20_000
    peaks = []
    for blocks in (18, 86):  # both by several processes, which may all be at a part of the text
        path = tmp_path / f"{blocks}.txt"
        path.write_bytes(block * blocks)
        tracemalloc.start()
        corpus = prepare(path, cache, tokenizer=tokenizer, split="position")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert corpus.train.num_bytes + corpus.validation.num_bytes == blocks * len(block)
    assert peaks[1] < peaks[0] + 16 * len(block), peaks
    assert peaks[1] < path.stat().st_size / 2, peaks


def test_second_preparation_reads_the_store(monkeypatch, source, cache):
    first = prepare(source, cache)
    monkeypatch.setattr("simplernn_jax.data.token_store.tokenize", None)
    for tokenizer in (None, first.tokenizer):
        again = prepare(source, cache, known=tokenizer)
        assert again.content_hash == first.content_hash
        np.testing.assert_array_equal(again.train.tokens, first.train.tokens)


def test_settings_that_change_tokens_have_a_store_of_their_own(source, cache):
    prepare(source, cache)
    changes = [
        {"tokenizer": "char"},
        {"split": "position"},
        {"validation_fraction": 0.3},
        {"encoding_errors": "replace"},
        {"max_malformed_records": 1},
    ]
    for change in changes:
        prepare(source, cache, **change)
    assert len(stores(cache)) == 1 + len(changes)
    (source / "001.txt").write_text("changed")
    assert "changed" in texts_of(prepare(source, cache, validation_fraction=0.0).train)


def test_content_hash_is_that_of_the_content_and_not_of_names_or_times(tmp_path, source, cache):
    corpus = prepare(source, cache)
    shutil.copytree(source, tmp_path / "copy", copy_function=shutil.copyfile)
    for path in (tmp_path / "copy").iterdir():
        os.utime(path, (0, 0))
        path.rename(path.with_suffix(".md"))
    copy = prepare(tmp_path / "copy", cache)
    assert len(stores(cache)) == 2
    assert copy.content_hash == corpus.content_hash
    expected = hashlib.sha256(
        corpus.train.tokens.astype("<u2").tobytes() + corpus.train.document_starts.tobytes()
    )
    assert corpus.train.content_hash == expected.hexdigest()
    other = prepare(source, cache, tokenizer="char")
    assert other.content_hash != corpus.content_hash


@pytest.fixture
def stored(source, cache):
    """(the folder of a store, function that prepares its corpus and compares it)"""
    expected = prepare(source, cache)
    texts = texts_of(expected.train), texts_of(expected.validation)

    def check():
        again = prepare(source, cache)
        assert again.content_hash == expected.content_hash
        assert (texts_of(again.train), texts_of(again.validation)) == texts

    (store,) = stores(cache)
    return store, check


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("meta.json", "meta.json: missing, or was changed"),
        ("train.tokens", "the train split was changed"),
        ("validation.starts", "the validation split was changed"),
    ],
)
def test_a_corrupt_store_is_named_and_the_text_tokenized_again(stored, caplog, name, problem):
    """`scripts/stress.py stores` damages them in more ways."""
    store, check = stored
    flip_bit(store / name)
    check()
    (warning,) = [record.message for record in caplog.records if record.levelno > 20]
    assert re.search(f"{problem} .*re-tokenized", warning)
    caplog.clear()
    check()
    assert "corrupted" not in caplog.text


@pytest.mark.parametrize(
    ("old", "new"),
    [('"<u2"', '"|O"'), ('"store": "', '"store": "0'), ('"num_bytes": ', '"bytes": ')],
)
def test_a_record_of_something_else_is_not_used(stored, caplog, old, new):
    store, check = stored
    path = store / "meta.json"
    write_sealed(path, read_sealed(path).replace(old, new))
    check()
    assert "meta.json: not the record" in caplog.text


def test_an_error_of_the_machine_is_not_corruption(source, cache, monkeypatch, caplog):
    def fail(path, **options):
        if os.path.basename(path) == "train.tokens":
            raise OSError(errno.EACCES, "Permission denied")
        return open_file(path, **options)

    corpus = prepare(source, cache)
    for module in ("files", "data.store_files"):
        monkeypatch.setattr(f"simplernn_jax.{module}.open_file", fail)
    with pytest.raises(UserError, match="Permission denied"):
        prepare(source, cache)
    with pytest.raises(UserError, match="Permission denied; make it readable"):
        find_corpus(str(cache), corpus.content_hash, corpus.tokenizer)
    assert "corrupted" not in caplog.text
    (store,) = stores(cache)
    assert (store / "train.tokens").exists()


def test_what_a_killed_writer_left_is_removed_by_the_next(source, cache):
    prepare(source, cache)
    expected = contents(cache)
    (store,) = stores(cache)
    left = store.rename(cache / f".{store.name}.tmp")
    (cache / ".mine.tmp").mkdir()
    prepare(source, cache)
    assert not left.exists()
    (cache / ".mine.tmp").rmdir()
    assert contents(cache) == expected


def test_full_disk_or_no_folder_is_one_line_and_leaves_nothing(
    tmp_path, monkeypatch, source, cache
):
    with monkeypatch.context() as patch:
        error = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(os, "fsync", mock.Mock(side_effect=error))
        with pytest.raises(UserError, match=r"cache: No space left .*; free some.*cache_dir"):
            prepare(source, cache)
    assert not stores(cache)
    prepare(source, cache)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: (Not a directory|File exists); .*cache_dir"):
        prepare(source, tmp_path / "file")


def test_progress_is_shown_in_lines(tmp_path, caplog, monkeypatch, source):
    caplog.set_level("INFO")
    monkeypatch.setattr("simplernn_jax.data.tokenization.SECONDS_PER_LINE", 0)
    prepare(source, tmp_path / "a")
    first, *between, last = [record.message for record in caplog.records]
    assert re.fullmatch(rf"tokenizing {tmp_path / 'in'}: \d+ B \.\.\.", first)
    assert between
    assert all(re.search(r": \d+ %, \d+ s left$", line) for line in between)
    assert re.fullmatch(rf"tokenizing {tmp_path / 'in'}: done in [\d.]+ s", last)


def test_importing_the_package_loads_no_heavy_library():
    command = "import sys, simplernn_jax.data, simplernn_jax.data.batches; print(*sys.modules)"
    code, modules, errors = run_python("-c", command)
    assert code == 0, errors
    heavy = {"tensorflow_datasets", "tokenizers", "rich", "jax", "grain", "pyarrow", "zstandard"}
    assert not heavy & set(modules.split())


def use_cores(monkeypatch, count):
    monkeypatch.setattr("simplernn_jax.data.tokenization.available_cores", lambda: count)


@pytest.fixture
def jsonl(tmp_path, monkeypatch):
    """JSONL of 31 records, which make several parts, tokenized by this process."""
    use_cores(monkeypatch, 1)
    monkeypatch.setattr("simplernn_jax.data.tokenization.PART_CHARACTERS", 500)
    path = tmp_path / "in.jsonl"
    texts = [f"Text {i} — {'ä' * (i % 5)} " * (i % 7) for i in range(31)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


@pytest.fixture
def tokenizer():
    return pretrained(byte_level())


def lines_of(jsonl):
    return [json.loads(line)["text"] for line in jsonl.read_text("utf-8").splitlines()]


@pytest.mark.parametrize(("name", "cores"), [("a.jsonl", 3), ("a.json", 3), ("a.csv", 1)])
def test_tokens_depend_neither_on_the_format_nor_on_the_number_of_processes(
    jsonl, tokenizer, tmp_path, monkeypatch, cores, name
):
    expected = prepare(jsonl, tmp_path / "file", known=tokenizer, max_malformed_records=1)
    use_cores(monkeypatch, cores)
    with open(tmp_path / name, "w", encoding="utf-16") as file:
        if name == "a.jsonl":
            file.write(jsonl.read_text("utf-8") + "3\n")
        elif name == "a.json":
            json.dump([{"text": text} for text in lines_of(jsonl)] + [3], file)
        else:
            csv.writer(file).writerows([("n", "text"), *enumerate(lines_of(jsonl)), "bad"])
    with monkeypatch.context() as patch:
        if cores > 1:
            patch.setattr(tokenizer, "encode", None)  # not in this process
        found = prepare(
            tmp_path / name, tmp_path / "cache", known=tokenizer, max_malformed_records=1
        )
    assert found.content_hash == expected.content_hash


def test_texts_from_python_give_the_tokens_of_the_same_records(jsonl, tokenizer, tmp_path):
    expected = prepare(jsonl, tmp_path / "file", known=tokenizer)
    texts, cache = lines_of(jsonl), tmp_path / "cache"
    for again, count in ((texts, 1), (lambda: iter(texts), 1), ([*texts[:-1], "other"], 2)):
        corpus = prepare(again, cache, known=tokenizer)
        assert (corpus.content_hash == expected.content_hash) == (count == 1)
        assert len(stores(cache)) == count
    assert find_corpus(str(cache), expected.content_hash, tokenizer).summary == expected.summary


calls = itertools.count()


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        (["a", b"b"], r"<2 texts from Python>\[1\]: of type bytes; give strings"),
        ([], "<0 texts from Python>: no text in it"),
        (["\ud800"], "half a surrogate pair"),
        (lambda: ["a"] if next(calls) < 2 else ["b"], "<texts from Python>: changed while it was"),
    ],
)
def test_texts_from_python_that_cannot_be_used_are_one_line(tokenizer, tmp_path, texts, problem):
    with pytest.raises(UserError, match=problem):
        prepare(texts, tmp_path / "cache", known=tokenizer)
    with pytest.raises(UserError, match="come as JSONL"):
        prepare(texts, tmp_path / "cache", known=tokenizer, template="roles")


def test_errors_of_other_processes_are_named(jsonl, tokenizer, tmp_path, monkeypatch):
    use_cores(monkeypatch, 2)
    without_unknown = pretrained(word_level("Text", unknown="[NONE]"))
    with pytest.raises(UserError, match="the tokenizer cannot encode this text"):
        prepare(jsonl, tmp_path / "cache", known=without_unknown)
    lines = jsonl.read_text("utf-8").splitlines()
    lines = ["[]" if number in (2, 15, 28) else line for number, line in enumerate(lines)]
    jsonl.write_text("\n".join(lines), "utf-8")
    with pytest.raises(UserError, match=r"in\.jsonl:29: of type list.*record 3, 2 allowed"):
        prepare(jsonl, tmp_path / "cache", known=tokenizer, max_malformed_records=2)
    assert not stores(tmp_path / "cache")


def test_conversations_are_rendered_by_other_processes(tmp_path, jsonl, tokenizer, monkeypatch):
    with open(jsonl, "w") as stream:
        for number in range(31):
            turns = [("user", f"question {number}"), ("assistant", f"answer {number} " * 5)]
            messages = [{"role": role, "content": content} for role, content in turns]
            stream.write(json.dumps({"messages": messages}) + "\n")
    settings = {"template": "roles", "loss_mask": "assistant"}
    for cores in (1, 2):
        use_cores(monkeypatch, cores)
        prepare(jsonl, tmp_path / str(cores), known=tokenizer, **settings)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert "train.targets" in contents(tmp_path / "1")


def test_processes_end_together(jsonl, tokenizer, tmp_path, monkeypatch):
    workers = set()

    def texts():
        for number, text in enumerate(lines_of(jsonl)):
            workers.update(multiprocessing.active_children())
            for worker in workers if number == 20 else ():
                worker.kill()
            yield text

    use_cores(monkeypatch, 3)
    with pytest.raises(UserError, match="a process that tokenizes died"):
        prepare(texts, tmp_path / "cache", known=tokenizer)
    assert workers
    assert not any(worker.is_alive() for worker in workers)
    assert not stores(tmp_path / "cache")


SCRIPT = """
import multiprocessing, os, sys
print("runs", flush=True)
from simplernn_jax.config import DataConfig
from simplernn_jax.data import prepare_corpus, tokenization

tokenization.available_cores = lambda: 3
tokenization.PART_CHARACTERS = 500
config = DataConfig(tokenizer=sys.argv[1])
def texts():
    for number in range(99):
        if number == 60 and multiprocessing.active_children():
            os.kill(os.getpid(), 9)
        yield f"text {number} " * 9
config.source = texts
prepare_corpus(config, 3, "cache")
"""


def test_a_script_without_a_guard_runs_once_and_its_processes_end_with_it(tokenizer, tmp_path):
    for module in ("pickle.py", "socket.py"):
        (tmp_path / module).write_text("raise SystemExit('of the current folder')")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "script.py").write_text(SCRIPT)
    (tmp_path / "tokenizer.json").write_text(tokenizer.tokenizer_json)
    done = run_python("scripts/script.py", "tokenizer.json", cwd=tmp_path, timeout=60)
    assert (done.code, done.output) == (-signal.SIGKILL, "runs\n")
    assert "Error" not in done.errors


@given(st.data())
def test_concatenated_arrays_are_read_as_one(data):
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
    whole = np.arange(sum(lengths), dtype=np.uint16)
    array = ConcatenatedArray(np.split(whole, np.cumsum(lengths)[:-1]))
    start, stop = (data.draw(st.integers(-2 * len(whole), 2 * len(whole))) for _ in range(2))
    np.testing.assert_array_equal(array[start:stop], whole[start:stop])
    positions = np.arange(6).reshape(2, 3) * data.draw(st.integers(1, 7)) % len(whole)
    np.testing.assert_array_equal(array[positions], whole[positions])
    np.testing.assert_array_equal(np.asarray(array), whole)
