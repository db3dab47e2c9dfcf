"""A BPE of the training split: its vocabulary, its words, its cache and its script."""

import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from processes import ROOT, run_scripts
from small_data import bpe_of
from tokenizers import pre_tokenizers

from simplernn_jax.config import DataConfig
from simplernn_jax.data import load_tokenizer, prepare_corpus, tokenizer_from_json
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


def test_the_corpus_is_tokenized_with_merges_of_its_training_split(source, tmp_path):
    corpus = prepare_corpus(config_of(source), 3, str(tmp_path / "cache"))
    as_bytes = prepare_corpus(config_of(source, tokenizer="byte"), 3, str(tmp_path / "cache"))
    tokenizer = corpus.tokenizer
    assert tokenizer.vocab_size == SIZE
    specials = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    assert sorted(specials) == [*range(SIZE - 3, SIZE)]
    lengths = []
    for ours, theirs in [(corpus.train, as_bytes.train), (corpus.validation, as_bytes.validation)]:
        assert len(ours.tokens) < len(theirs.tokens)
        assert ours.num_bytes == theirs.num_bytes
        text = tokenizer.decode(ours.tokens)
        assert text == as_bytes.tokenizer.decode(theirs.tokens)
        lengths.append([len(tokenizer.encode(f" {word}")) for word in re.findall(r"\wq\w", text)])
    assert max(lengths[0]) == 1
    assert min(lengths[1]) > 1


def test_it_is_cached_verified_and_restored_from_its_json(source, tmp_path):
    cache = tmp_path / "cache"
    first = train_tokenizer(config_of(source), 3, str(cache))
    (path,) = cache.glob(".bpe-*")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"merges", b"merged"))
    again = train_tokenizer(config_of(source), 3, str(cache))
    assert path.read_bytes() == content
    assert again.to_json() == first.to_json()
    restored = tokenizer_from_json(first.to_json())
    np.testing.assert_array_equal(restored.encode("the same ä"), first.encode("the same ä"))
    assert train_tokenizer(config_of(source), 5, str(cache)).to_json() != first.to_json()


def test_the_script_writes_the_same_in_another_process(source, tmp_path):
    output = tmp_path / "new.json"
    script = (
        *(ROOT / "scripts" / "train_tokenizer.py", "--config", ROOT / "configs" / "base.py"),
        *(f"--config.data.source={source}", f"--config.data.tokenizer=bpe:{SIZE}"),
        *("--config.data.validation_fraction=0.3", "--config.train.seed=3"),
    )
    done, wrong = run_scripts(
        (*script, f"--output={output}"),
        (*script, f"--output={tmp_path / 'missing' / 'a.json'}"),
        RAYON_NUM_THREADS="3",
    )
    assert done.code == 0, done.errors
    assert f"new.json: {SIZE}" in done.output
    expected = train_tokenizer(config_of(source), 3, str(tmp_path / "cache"))
    assert output.read_text("utf-8") == expected.tokenizer_json
    loaded = config_of(source, tokenizer=str(output))
    assert prepare_corpus(loaded, 3, str(tmp_path / "b")).tokenizer.vocab_size == SIZE
    assert wrong.code == 2
    assert "a.json: its folder does not exist; create it" in wrong.errors
    assert "training" not in wrong.errors


def test_a_tokenizer_may_be_larger_than_most_files(source, tmp_path):
    """One of a million ids of Chinese text is."""
    tokenizer = train_tokenizer(config_of(source), 3, str(tmp_path / "cache"))
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.tokenizer_json + " " * SMALL_FILE)
    assert load_tokenizer(str(path)).vocab_size == tokenizer.vocab_size


@pytest.mark.parametrize("character", ["ä", "-", "\n"])
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


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("bpe:258", "vocabulary size from 259 to 1,048,576"),
        ("bpe:٣٠٠", "vocabulary size from 259 to 1,048,576"),
        ("bpe", "'bpe' needs a vocabulary size; use bpe:8192"),
    ],
)
def test_an_impossible_size_is_rejected(source, tmp_path, spec, problem):
    with pytest.raises(UserError, match=problem):
        prepare_corpus(config_of(source, tokenizer=spec), 3, str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()
