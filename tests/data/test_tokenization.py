"""Tokenization by several processes, and stores of several blocks."""

import csv
import itertools
import json
import multiprocessing
import signal

import numpy as np
import pytest
from corpus_files import contents, stores
from damages import flip_bit
from hypothesis import given
from hypothesis import strategies as st
from processes import run_python
from small_tokenizers import byte_level, pretrained, word_level

from simplernn_jax.config import DataConfig
from simplernn_jax.data import prepare_corpus
from simplernn_jax.data.token_split import ConcatenatedArray
from simplernn_jax.data.token_store import find_corpus
from simplernn_jax.errors import UserError
from simplernn_jax.files import read_sealed


def use_cores(monkeypatch, count):
    monkeypatch.setattr("simplernn_jax.data.tokenization.available_cores", lambda: count)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """JSONL of 31 records, which make several parts and blocks, tokenized by this process."""
    use_cores(monkeypatch, 1)
    monkeypatch.setattr("simplernn_jax.data.tokenization.PART_CHARACTERS", 500)
    monkeypatch.setattr("simplernn_jax.data.store_files.BLOCK_BYTES", 256)
    monkeypatch.setattr("simplernn_jax.data.store_files._READ_BYTES", 64)
    path = tmp_path / "in.jsonl"
    texts = [f"Text {i} — {'ä' * (i % 5)} " * (i % 7) for i in range(31)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


@pytest.fixture
def tokenizer():
    return pretrained(byte_level())


def prepare(source, cache, tokenizer, **settings):
    config = DataConfig(validation_fraction=0.2, **settings)
    config.source = source if callable(source) or isinstance(source, list) else str(source)
    return prepare_corpus(config, 3, str(cache), tokenizer=tokenizer)


def texts_of(source):
    return [json.loads(line)["text"] for line in source.read_text("utf-8").splitlines()]


def test_the_store_is_the_same_for_every_number_of_processes(
    source, tokenizer, tmp_path, monkeypatch
):
    prepare(source, tmp_path / "one", tokenizer)
    use_cores(monkeypatch, 3)
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "encode", None)  # not in this process
        prepare(source, tmp_path / "three", tokenizer)
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


@pytest.mark.parametrize(("name", "cores"), [("a.json", 3), ("a.csv", 1)])
def test_records_of_every_format_give_the_same_tokens(
    source, tokenizer, tmp_path, monkeypatch, cores, name
):
    expected = prepare(source, tmp_path / "file", tokenizer, max_malformed_records=1)
    use_cores(monkeypatch, cores)
    with open(tmp_path / name, "w", encoding="utf-16") as file:
        if name == "a.json":
            json.dump([{"text": text} for text in texts_of(source)] + [3], file)
        else:
            csv.writer(file).writerows([("n", "text"), *enumerate(texts_of(source)), "bad"])
    corpus = prepare(tmp_path / name, tmp_path / "cache", tokenizer, max_malformed_records=1)
    assert corpus.content_hash == expected.content_hash


def test_texts_from_python_give_the_tokens_of_the_same_records(
    source, tokenizer, tmp_path, monkeypatch
):
    expected = prepare(source, tmp_path / "file", tokenizer)
    texts, cache = texts_of(source), tmp_path / "cache"
    use_cores(monkeypatch, 3)
    for again, count in ((texts, 1), (lambda: iter(texts), 1), ([*texts[:-1], "other"], 2)):
        corpus = prepare(again, cache, tokenizer)
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
        prepare(texts, tmp_path / "cache", tokenizer)
    with pytest.raises(UserError, match="come as JSONL"):
        prepare(texts, tmp_path / "cache", tokenizer, template="roles")


def test_errors_of_other_processes_are_named(source, tokenizer, tmp_path, monkeypatch):
    use_cores(monkeypatch, 2)
    without_unknown = pretrained(word_level("Text", unknown="[NONE]"))
    with pytest.raises(UserError, match="the tokenizer cannot encode this text"):
        prepare(source, tmp_path / "cache", without_unknown)
    lines = source.read_text("utf-8").splitlines()
    lines = ["[]" if number in (2, 15, 28) else line for number, line in enumerate(lines)]
    source.write_text("\n".join(lines), "utf-8")
    with pytest.raises(UserError, match=r"in\.jsonl:29: of type list.*record 3, 2 allowed"):
        prepare(source, tmp_path / "cache", tokenizer, max_malformed_records=2)
    assert not stores(tmp_path / "cache")


def test_conversations_are_rendered_by_other_processes(tmp_path, source, tokenizer, monkeypatch):
    with open(source, "w") as stream:
        for number in range(31):
            turns = [("user", f"question {number}"), ("assistant", f"answer {number} " * 5)]
            messages = [{"role": role, "content": content} for role, content in turns]
            stream.write(json.dumps({"messages": messages}) + "\n")
    settings = {"template": "roles", "loss_mask": "assistant"}
    for cores in (1, 2):
        use_cores(monkeypatch, cores)
        prepare(source, tmp_path / str(cores), tokenizer, **settings)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert "train.targets" in contents(tmp_path / "1")


def test_processes_end_together(source, tokenizer, tmp_path, monkeypatch):
    workers = set()

    def texts():
        for number, text in enumerate(texts_of(source)):
            workers.update(multiprocessing.active_children())
            for worker in workers if number == 20 else ():
                worker.kill()
            yield text

    use_cores(monkeypatch, 3)
    with pytest.raises(UserError, match="a process that tokenizes died"):
        prepare(texts, tmp_path / "cache", tokenizer)
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


def test_damage_to_any_block_is_found(source, tokenizer, tmp_path, caplog):
    first = prepare(source, tmp_path / "cache", tokenizer)
    (store,) = stores(tmp_path / "cache")
    digests = json.loads(read_sealed(store / "meta.json"))["splits"]["train"]["sha256"]["tokens"]
    assert len(digests) > 3
    flip_bit(store / "train.tokens")
    again = prepare(source, tmp_path / "cache", tokenizer)
    assert "train.tokens: was changed (corrupted)" in caplog.text
    assert again.content_hash == first.content_hash


@given(st.data())
def test_concatenated_arrays_are_read_as_one(data):
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
    whole = np.arange(sum(lengths), dtype=np.uint16)
    array = ConcatenatedArray(np.split(whole, np.cumsum(lengths)[:-1]))
    start, stop = (data.draw(st.integers(-2 * len(whole), 2 * len(whole))) for _ in range(2))
    np.testing.assert_array_equal(array[start:stop], whole[start:stop])
    inside = st.integers(0, len(whole) - 1)
    positions = np.array(data.draw(st.lists(inside, min_size=6, max_size=6))).reshape(2, 3)
    np.testing.assert_array_equal(array[positions], whole[positions])
    np.testing.assert_array_equal(np.asarray(array), whole)
