"""Tokenizers: bytes, characters, ``tokenizer.json`` and a trained BPE, and text that they lose."""

import json
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from processes import ROOT, run_scripts
from small_data import bpe_of, byte_level, char_tokenizer, pretrained, word_level
from tokenizers import normalizers, pre_tokenizers

from benchmarks.stress.fuzz import TEXT, byte_level_json
from simplernn_jax.config import DataConfig
from simplernn_jax.data import load_tokenizer, open_corpus, prepare_corpus, tokenizer_from_json
from simplernn_jax.data.token_store import train_tokenizer
from simplernn_jax.errors import UserError


def byte_fallback_json() -> str:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": i + 3 for i in range(256)}
    for token in ("▁", "a", "b", "▁a", "ab"):
        vocabulary[token] = len(vocabulary)
    model = tokenizers.models.BPE(
        vocab=vocabulary, merges=[("▁", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    parts = tokenizers.decoders
    tokenizer.decoder = parts.Sequence(
        [parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse()]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer.to_str()


def saved(tokenizer_json: str, **special_ids: object) -> str:
    ids = {"bos_id": None, "eos_id": None, "pad_id": None} | special_ids
    return json.dumps({"kind": "pretrained", "tokenizer": tokenizer_json, "special_ids": ids})


BYTES = load_tokenizer("byte")
BYTE_LEVEL = tokenizer_from_json(saved(byte_level_json()))
PRETRAINED = tokenizer_from_json(saved(byte_level_json("<s>", "</s>")))


def check_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    return ids.tolist()


@given(st.text())
def test_bytes_round_trip(text):
    assert check_round_trip(BYTES, text) == list(text.encode())


def test_byte_specials_stand_for_no_text():
    assert (BYTES.bos_id, BYTES.eos_id, BYTES.pad_id, BYTES.vocab_size) == (256, 257, 258, 259)
    assert BYTES.decode([256, 104, -1, 105, 257, 258, 300]) == "hi"
    assert BYTES.decode([104, 0xC3]) == "h\ufffd"
    assert BYTES.decode_bytes([104, 0xC3]) == b"h\xc3"


@given(st.text(min_size=1).flatmap(lambda a: st.tuples(st.just(a), st.text(st.sampled_from(a)))))
def test_characters_round_trip(alphabet_and_text):
    alphabet, text = alphabet_and_text
    tokenizer = char_tokenizer("".join(sorted(set(alphabet))))
    assert set(check_round_trip(tokenizer, text)) <= set(range(tokenizer.bos_id))


def test_alphabet_is_that_of_the_whole_corpus_sorted(tmp_path):
    (tmp_path / "a.txt").write_text("cab", encoding="utf-8")
    (tmp_path / "b.txt").write_text("🙂é\n", encoding="utf-8")
    tokenizer = load_tokenizer("char", open_corpus(DataConfig(source=str(tmp_path))))
    assert tokenizer.encode("\nabcé🙂").tolist() == [0, 1, 2, 3, 4, 5]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (6, 7, 8)
    assert tokenizer.vocab_size == 9
    assert tokenizer.decode([6, 3, 7, 8, 9, -1, 1]) == "ca"
    with pytest.raises(UserError, match=r"'z' at character 2 is not among the 6 characters.*byte"):
        tokenizer.encode("abza")


@given(st.text(st.characters(min_codepoint=1, exclude_categories=["Cs"])))
def test_byte_level_vocabulary_round_trips_any_text(text):
    ids = check_round_trip(BYTE_LEVEL, text)
    assert b"".join(BYTE_LEVEL.decode_bytes([number]) for number in ids) == text.encode()


def test_specials_are_found_by_name_and_the_others_appended():
    specials = [PRETRAINED.bos_id, PRETRAINED.eos_id, PRETRAINED.pad_id]
    assert specials == [0, 1, PRETRAINED.vocab_size - 1]
    ids = PRETRAINED.encode(TEXT)  # in which their names are text
    assert not {*specials} & set(ids.tolist())
    assert PRETRAINED.decode([0, *ids.tolist(), 1, PRETRAINED.pad_id]) == TEXT


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path):
    tokenizer = tokenizers.Tokenizer.from_str(byte_level_json())
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=500)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert loaded.decode(loaded.encode(TEXT)) == TEXT
    assert len(loaded.encode("abc" * 41)) < 500


def test_unfinished_characters_of_byte_tokens_can_be_finished():
    tokenizer = tokenizer_from_json(saved(byte_fallback_json()))
    text = "ab é🙂 a"
    ids = tokenizer.encode(text).tolist()
    assert tokenizer.decode(ids) == text
    for stop in range(len(ids) + 1):
        assert text.encode().startswith(tokenizer.decode_bytes(ids[:stop]))


@pytest.mark.parametrize("tokenizer", [BYTES, char_tokenizer("".join({*TEXT})), PRETRAINED])
def test_json_is_complete_and_stable(tokenizer):
    again = tokenizer_from_json(tokenizer.to_json())
    assert again.to_json() == tokenizer.to_json()
    np.testing.assert_array_equal(again.encode(TEXT), tokenizer.encode(TEXT))
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id"):
        assert getattr(again, name) == getattr(tokenizer, name)
    with pytest.raises(UserError, match=r"U\+DCE9 at character 2 .* half a surrogate pair"):
        tokenizer.encode("os\udce9")


def word_level_json(unknown: str = "[UNK]") -> str:
    return word_level("alpha", "beta", unknown=unknown).to_str()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (saved(word_level_json("gone")), r"cannot encode this text \(.*[Mm]issing"),
        (saved(word_level_json().replace('"beta":2', '"beta":4294967295')), "4,294,967,295"),
        (saved(word_level_json(), bos_id=-1), "special id -1"),
        ('{"kind": "char", "alphabet": "aba"}', "each character once"),
        ('{"kind": "char"}', "tokenizer is corrupted"),
        ('{"kind": "new"}', "of kind 'new'; a newer version"),
        (saved("["), "cannot be loaded"),
    ],
)
def test_problems_of_a_saved_tokenizer_are_named(text, problem):
    with pytest.raises(UserError, match=problem):
        tokenizer_from_json(text).encode("gamma")


def test_a_merge_without_its_prefix_is_rejected_since_the_library_would_abort():
    model = {
        "type": "BPE",
        "vocab": {"a": 0, "é": 1, "aé": 2},
        "merges": [["a", "é"]],
        "continuing_subword_prefix": "\0",
    }
    with pytest.raises(UserError, match=r"cannot be loaded .* lacks its continuing_subword_prefix"):
        pretrained(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))


def test_unreadable_tokenizer_files_are_one_line(tmp_path):
    path = tmp_path / "tokenizer.json"

    def check(problem, spec=str(path)):
        with pytest.raises(UserError, match=rf"^tokenizer .*{problem}") as raised:
            load_tokenizer(spec)
        assert "\n" not in str(raised.value)

    check(r"tokenizer\.json: No such file")
    for content in (b"{", b"\xff\xfe", json.dumps({"model": {"type": "X"}}).encode()):
        path.write_bytes(content)
        check(r"tokenizer\.json: .*pass a tokenizer\.json")
    with open(path, "wb") as stream:
        stream.truncate(1 << 40)
    check("larger than 268,435,456 bytes")
    check("", "a\0.json")


def test_a_hub_name_that_cannot_be_loaded_is_one_line(monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", mock.Mock(side_effect=OSError("offline"))
    )
    with pytest.raises(UserError, match=r"tokenizer 'bytes': neither a file nor .*\(offline\)"):
        load_tokenizer("bytes")


@pytest.fixture
def prepare(tmp_path):
    """A function that prepares a corpus of two documents with a tokenizer."""
    text = "First line\nsecond ﬁne — Zeile ä\x1b" + "x" * 50
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("First")
    (tmp_path / "in" / "b.txt").write_text(text, encoding="utf-8")

    def with_tokenizer(tokenizer):
        path = tmp_path / "tokenizer.json"
        tokenizer.save(str(path))
        config = DataConfig(source=str(tmp_path / "in"), tokenizer=str(path))
        return prepare_corpus(config, 0, str(tmp_path / "cache"))

    return with_tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "difference"),
    [
        (byte_level(normalizers.Lowercase()), r"'First' comes back as 'first' at character 0 in a"),
        (byte_level(add_prefix_space=True), r"'First' comes back as ' First' at character 0 in a"),
        (
            byte_level(normalizers.Replace("\x1b", "")),
            r"'.*Zeile ä\\x1bxx.*' comes back as '.*Zeile äxxx.*' at character 31 in b",
        ),
        (
            word_level("First", "line"),
            r"'First line\\nsec.*' comes back as 'First line \[UNK\].*' at character 10 in b",
        ),
    ],
)
def test_a_lossy_tokenizer_is_rejected_with_the_first_difference(
    prepare, tmp_path, tokenizer, difference
):
    with pytest.raises(UserError, match=rf"tokenizer\.json: loses text: {difference}"):
        prepare(tokenizer)
    assert not (tmp_path / "cache").exists()


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
