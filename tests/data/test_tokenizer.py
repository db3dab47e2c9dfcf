"""Tokenizers: bytes, characters and ``tokenizer.json``, and text that they lose."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from processes import run_python
from small_data import byte_level, char_tokenizer, pretrained, word_level
from tokenizers import normalizers

from benchmarks.stress.fuzz import TEXT, byte_level_json
from simplernn_jax.config import DataConfig
from simplernn_jax.data import load_tokenizer, open_corpus, prepare_corpus, tokenizer_from_json
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


@pytest.mark.parametrize("prefix", ["\0", "##"])
def test_a_merge_without_its_prefix_is_rejected_since_the_library_would_abort(prefix):
    model = {
        "type": "BPE",
        "vocab": {"a": 0, "é": 1, "aé": 2},
        "merges": [["a", "é"]],
        "continuing_subword_prefix": prefix,
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


LOAD = """
import sys
from simplernn_jax.data import load_tokenizer

try:
    load_tokenizer(sys.argv[1])
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_hub_name_that_cannot_be_loaded_is_one_line(tmp_path):
    # In a process of its own, because the hub's client reads its environment when imported.
    hub = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    _, output, _ = run_python("-c", LOAD, "bytes", **hub)
    (line,) = output.splitlines()
    assert line.startswith("UserError tokenizer 'bytes': neither a file nor cached here, and")


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


def test_only_a_sample_is_checked_for_lost_text(prepare, monkeypatch):
    monkeypatch.setattr("simplernn_jax.data.tokenizer._SAMPLE_CHARACTERS", 15)
    prepare(byte_level(normalizers.NFKC()))
    monkeypatch.setattr("simplernn_jax.data.tokenizer._SAMPLE_CHARACTERS", 24)
    with pytest.raises(UserError, match="loses text"):
        prepare(byte_level(normalizers.NFKC()))
