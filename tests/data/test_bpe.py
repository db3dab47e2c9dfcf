import os
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from processes import ROOT, run_python
from small_tokenizers import bpe_of
from tokenizers import pre_tokenizers

from simplernn_jax.config import DataConfig
from simplernn_jax.data import bpe, load_tokenizer, prepare_corpus, tokenizer_from_json
from simplernn_jax.data.token_store import train_tokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.files import SMALL_FILE

SIZE = 307


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Thirteen documents with words of their own beside common ones."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(13):
        own = f"{chr(97 + i)}q{chr(97 + i)} " * 40
        (folder / f"{i:02}.txt").write_text(f"the common words — all the same {own}", "utf-8")
    return folder


def config_of(source: Path, **settings) -> DataConfig:
    settings = {"tokenizer": f"bpe:{SIZE}", "validation_fraction": 0.3} | settings
    return DataConfig(source=str(source), **settings)


def test_the_corpus_is_tokenized_with_the_vocabulary_asked_for(source, tmp_path):
    corpus = prepare_corpus(config_of(source), 3, str(tmp_path / "cache"))
    as_bytes = prepare_corpus(config_of(source, tokenizer="byte"), 3, str(tmp_path / "cache"))

    assert corpus.tokenizer.vocab_size == SIZE
    assert sorted([corpus.tokenizer.bos_id, corpus.tokenizer.eos_id, corpus.tokenizer.pad_id]) == [
        *range(SIZE - 3, SIZE)
    ]
    for ours, theirs in [(corpus.train, as_bytes.train), (corpus.validation, as_bytes.validation)]:
        assert len(ours.tokens) < len(theirs.tokens)
        assert ours.num_bytes == theirs.num_bytes
        assert corpus.tokenizer.decode(ours.tokens) == as_bytes.tokenizer.decode(theirs.tokens)


def test_no_merge_comes_from_the_validation_split(source, tmp_path):
    corpus = prepare_corpus(config_of(source), 3, str(tmp_path / "cache"))
    words = {
        split: set(re.findall(r"\wq\w", corpus.tokenizer.decode(split_tokens.tokens)))
        for split, split_tokens in [("train", corpus.train), ("held out", corpus.validation)]
    }
    assert len(words["train"]) + len(words["held out"]) == 13

    lengths = {
        split: {len(corpus.tokenizer.encode(f" {word}")) for word in found}
        for split, found in words.items()
    }
    assert lengths["train"] == {1}
    assert min(lengths["held out"]) > 1


def test_it_is_cached_verified_and_restored_from_its_json(source, tmp_path):
    cache = tmp_path / "cache"
    first = train_tokenizer(config_of(source), 3, str(cache))
    (path,) = cache.glob(".bpe-*")
    content = path.read_bytes()

    path.write_bytes(content.replace(b"merges", b"merged"))
    again = train_tokenizer(config_of(source), 3, str(cache))

    assert path.read_bytes() == content
    assert again.to_json() == first.to_json()
    np.testing.assert_array_equal(
        tokenizer_from_json(first.to_json()).encode("the same ä"), first.encode("the same ä")
    )
    assert train_tokenizer(config_of(source), 5, str(cache)).to_json() != first.to_json()


@pytest.mark.parametrize("threads", [1, 3])
def test_the_script_writes_the_same_in_another_process(source, tmp_path, threads):
    output = tmp_path / "tokenizer.json"
    done = run_python(
        ROOT / "scripts" / "train_tokenizer.py",
        *("--config", ROOT / "configs" / "base.py", f"--config.data.source={source}"),
        *(f"--config.data.tokenizer=bpe:{SIZE}", "--config.data.validation_fraction=0.3"),
        *("--config.train.seed=3", f"--output={output}"),
        RAYON_NUM_THREADS=str(threads),
    )
    assert done.code == 0, done.errors
    assert str(SIZE) in done.output

    expected = train_tokenizer(config_of(source), 3, str(tmp_path / "cache"))
    assert output.read_text("utf-8") == expected.tokenizer_json
    loaded = config_of(source, tokenizer=str(output))
    assert prepare_corpus(loaded, 3, str(tmp_path / "b")).tokenizer.vocab_size == SIZE


def test_an_output_that_cannot_be_written_is_rejected_before_the_work(source, tmp_path):
    done = run_python(
        ROOT / "scripts" / "train_tokenizer.py",
        *("--config", ROOT / "configs" / "base.py", f"--config.data.source={source}"),
        *(f"--config.data.tokenizer=bpe:{SIZE}", f"--output={tmp_path / 'missing' / 'a.json'}"),
    )
    assert done.code == 2
    assert "a.json: its folder does not exist; create it" in done.errors
    assert "training" not in done.errors


def test_a_name_that_stdout_cannot_show_is_escaped(source, tmp_path):
    output = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.json")
    done = run_python(
        ROOT / "scripts" / "train_tokenizer.py",
        *("--config", ROOT / "configs" / "base.py", f"--config.data.source={source}"),
        *(f"--config.data.tokenizer=bpe:{SIZE}", f"--output={output}"),
        PYTHONIOENCODING="utf-8:strict",
    )
    assert done.code == 0, done.errors
    assert r"caf\udce9.json" in done.output


def test_a_tokenizer_may_be_larger_than_most_files(source, tmp_path):
    """One of a million ids of Chinese text is."""
    tokenizer = train_tokenizer(config_of(source), 3, str(tmp_path / "cache"))
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.tokenizer_json + " " * SMALL_FILE)
    assert load_tokenizer(str(path)).vocab_size == tokenizer.vocab_size


def test_documents_beyond_the_bytes_to_train_on_are_not_read(source, tmp_path, monkeypatch):
    corpus = prepare_corpus(config_of(source, tokenizer="byte"), 3, str(tmp_path / "cache"))
    starts = corpus.train.document_starts
    whole = list(bpe._texts(corpus.train, len(corpus.train.tokens)))
    assert len(whole) == len(starts)
    for limit in (0, 1, int(starts[2]), int(starts[2]) + 1):
        count = int(np.sum(starts < limit))
        assert list(bpe._texts(corpus.train, limit)) == whole[:count]


def test_a_part_of_a_long_document_may_end_inside_a_character(source, tmp_path, monkeypatch):
    monkeypatch.setattr("simplernn_jax.data.bpe._PART_BYTES", 7)
    assert train_tokenizer(config_of(source), 3, str(tmp_path / "cache")).encode("ä—").size


@pytest.mark.parametrize("character", ["a", "ä", "7", "-", " ", "\n"])
def test_no_word_is_longer_than_128_characters(character):
    """Or training takes the square of its length."""
    text = f"{character * 100_000}x"
    tokenizer = bpe_of(text, 400)
    longest = max(len(tokenizer.decode([number])) for number in range(tokenizer.vocab_size))
    assert longest == 128
    ids = tokenizer.encode(text)
    assert len(ids) <= 100_000 // 128 + 8
    assert tokenizer.decode(ids) == text


def test_ordinary_words_are_those_of_gpt2():
    tokenizer = bpe_of("a")
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ours = tokenizers.Tokenizer.from_str(tokenizer.tokenizer_json).pre_tokenizer
    text = "I've 12 apples—it's   fine,\n\n  don't ... (a_b) déjà-vu 東京 \t\u3000x"
    text += " " * 90 + "\n"
    assert ours.pre_tokenize_str(text) == words.pre_tokenize_str(text)


@pytest.mark.parametrize("size", ["", "258", "1e4", "-5", "٣٠٠", "1048577", "9" * 40, "8192 "])
def test_an_impossible_size_is_rejected(source, tmp_path, size):
    with pytest.raises(UserError, match="vocabulary size from 259 to 1,048,576"):
        prepare_corpus(config_of(source, tokenizer=f"bpe:{size}"), 3, str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_a_bpe_without_a_size_says_so(source, tmp_path):
    with pytest.raises(UserError, match="'bpe' needs a vocabulary size; use bpe:8192"):
        prepare_corpus(config_of(source, tokenizer="bpe"), 3, str(tmp_path / "cache"))


def test_a_text_with_few_pairs_gives_a_smaller_vocabulary(source, tmp_path):
    tokenizer = train_tokenizer(config_of(source, tokenizer="bpe:60000"), 3, str(tmp_path / "c"))
    assert 259 < tokenizer.vocab_size < 60_000
