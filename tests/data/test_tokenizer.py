import contextlib
import json
import os
import random

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from processes import run_python
from small_tokenizers import char_tokenizer, word_level

from benchmarks.stress.fuzz import TEXT, byte_level_json
from benchmarks.stress.mutation import mutated
from simplernn_jax.config import DataConfig
from simplernn_jax.data import load_tokenizer, open_corpus, tokenizer_from_json
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


BYTE_LEVEL = saved(byte_level_json())


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(byte_level_json("<s>", "</s>"), encoding="utf-8")
    return load_tokenizer(str(path), None)


@pytest.fixture(params=["byte", "char", "pretrained"])
def any_tokenizer(request, pretrained):
    if request.param == "byte":
        return load_tokenizer("byte", None)
    return pretrained if request.param == "pretrained" else char_tokenizer("".join({*TEXT}))


def check_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    return ids.tolist()


@given(st.text())
def test_bytes_round_trip(text):
    assert check_round_trip(load_tokenizer("byte", None), text) == list(text.encode())


def test_byte_specials_stand_for_no_text():
    tokenizer = load_tokenizer("byte", None)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (256, 257, 258)
    assert tokenizer.vocab_size == 259
    assert tokenizer.decode([256, 104, -1, 105, 257, 258, 300]) == "hi"


@given(st.binary())
def test_any_bytes_decode_with_replacement(data):
    tokenizer = load_tokenizer("byte", None)
    assert tokenizer.decode(list(data)) == data.decode("utf-8", "replace")
    assert tokenizer.decode_bytes(list(data)) == data


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


def test_unknown_character_is_named():
    with pytest.raises(UserError, match=r"'z' at character 2 is not among the 3 characters.*byte"):
        char_tokenizer("abc").encode("abza")


@given(st.text(st.characters(min_codepoint=1, exclude_categories=["Cs"])))
def test_byte_level_vocabulary_round_trips_any_text(text):
    tokenizer = tokenizer_from_json(BYTE_LEVEL)
    ids = check_round_trip(tokenizer, text)
    assert b"".join(tokenizer.decode_bytes([number]) for number in ids) == text.encode()


def test_specials_are_found_by_name_and_the_others_appended(pretrained):
    assert (pretrained.bos_id, pretrained.eos_id) == (0, 1)
    assert pretrained.pad_id == pretrained.vocab_size - 1
    assert pretrained.decode([0, *pretrained.encode("hi").tolist(), 1, pretrained.pad_id]) == "hi"


def test_names_of_specials_in_a_text_are_text(pretrained):
    ids = pretrained.encode(TEXT)
    assert not {pretrained.bos_id, pretrained.eos_id, pretrained.pad_id} & set(ids.tolist())
    assert pretrained.decode(ids) == TEXT


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path):
    tokenizer = tokenizers.Tokenizer.from_str(byte_level_json())
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=500)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"), None)
    assert loaded.decode(loaded.encode(TEXT)) == TEXT
    assert len(loaded.encode("abc" * 41)) < 500


def test_unfinished_characters_of_byte_tokens_can_be_finished(tmp_path):
    (tmp_path / "t.json").write_text(byte_fallback_json(), encoding="utf-8")
    tokenizer = load_tokenizer(str(tmp_path / "t.json"), None)
    text = "ab é🙂 a"
    ids = tokenizer.encode(text).tolist()
    assert tokenizer.decode(ids) == text
    for stop in range(len(ids) + 1):
        assert text.encode().startswith(tokenizer.decode_bytes(ids[:stop]))


def test_json_is_complete_and_stable(any_tokenizer):
    again = tokenizer_from_json(any_tokenizer.to_json())
    assert again.to_json() == any_tokenizer.to_json()
    np.testing.assert_array_equal(again.encode(TEXT), any_tokenizer.encode(TEXT))
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id"):
        assert getattr(again, name) == getattr(any_tokenizer, name)


def test_lone_surrogate_is_rejected(any_tokenizer):
    with pytest.raises(UserError, match=r"U\+DCE9 at character 2 .* half a surrogate pair"):
        any_tokenizer.encode("os\udce9")


def word_level_json(unknown: str = "[UNK]") -> str:
    return word_level("alpha", "beta", unknown=unknown).to_str()


def unigram_json() -> str:
    pieces = [("<unk>", 0.0), ("a", -1.0), ("b", -2.0), ("ab", -1.5)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    return tokenizer.to_str()


def use(text: str) -> None:
    """Call every method of a saved tokenizer."""
    tokenizer = tokenizer_from_json(text)
    for sample in (TEXT, "alpha ab", ""):
        ids = tokenizer.encode(sample)
        assert not ids.size or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size <= 1 << 25
        tokenizer.decode(ids)
    tokenizer.decode(range(-2, min(tokenizer.vocab_size + 2, 400)))
    tokenizer_from_json(tokenizer.to_json())


@pytest.mark.parametrize(
    ("text", "wrap"),
    [
        (byte_level_json(), saved),
        (byte_fallback_json(), saved),
        (word_level_json(), saved),
        (unigram_json(), saved),
        ('{"kind": "char", "alphabet": "ab c\\n"}', str),
        (saved(word_level_json()), str),
    ],
    ids=["byte level", "byte fallback", "word level", "unigram", "saved char", "saved word level"],
)
def test_every_damaged_tokenizer_works_or_is_one_line(text, wrap):
    with contextlib.suppress(UserError):  # the alphabet lacks the characters of TEXT
        use(wrap(text))
    for seed in range(100):
        broken = mutated(text.encode(), random.Random(seed)).decode("utf-8", "replace")
        with contextlib.suppress(UserError):
            use(wrap(broken))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (saved(word_level_json("gone")), r"cannot encode this text \(.*[Mm]issing"),
        (saved(word_level_json().replace('"beta":2', '"beta":4294967295')), "4,294,967,295"),
        (saved(word_level_json(), bos_id=2**32), "special id 4294967296"),
        (saved(word_level_json(), bos_id=-1), "special id -1"),
        (saved(word_level_json(), bos_id=True), "special id True"),
        ('{"kind": "char", "alphabet": "aba"}', "each character once"),
        ('{"kind": "char", "alphabet": [1, 2]}', "an alphabet is text"),
        *((text, "tokenizer is corrupted") for text in ("", "{}", "[]", "null", "[" * 100_000)),
        ('{"kind": "char"}', "tokenizer is corrupted"),
        ('{"kind": "new"}', "of kind 'new'; a newer version"),
        (saved("[" * 100_000), "corrupted"),
    ],
)
def test_problems_of_a_saved_tokenizer_are_named(text, problem):
    with pytest.raises(UserError, match=problem):
        tokenizer_from_json(text).encode("gamma")


def test_a_panic_of_the_library_is_one_line_and_an_interruption_is_none(monkeypatch):
    tokenizer = tokenizer_from_json(saved(word_level_json()))
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})

    class Failing:
        error = panic("index out of range")

        def encode_batch_fast(self, *_, **__):
            raise self.error

        decode = encode_batch_fast

    monkeypatch.setattr(tokenizer, "_tokenizer", Failing())
    with pytest.raises(UserError, match=r"cannot encode this text .PanicException: index out of"):
        tokenizer.encode("alpha")
    with pytest.raises(UserError, match=r"cannot decode these ids .PanicException: index out of"):
        tokenizer.decode([1])
    Failing.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("alpha")


def test_unreadable_tokenizer_files_are_one_line(tmp_path):
    path = tmp_path / "tokenizer.json"

    def check(problem, spec=str(path)):
        with pytest.raises(UserError, match=rf"tokenizer.*{problem}") as raised:
            load_tokenizer(spec, None)
        assert "\n" not in str(raised.value)

    check(r"tokenizer\.json: no such file")
    for content in (b"{", b"{}", b"\xff\xfe", json.dumps({"model": {"type": "X"}}).encode()):
        path.write_bytes(content)
        check(r"tokenizer\.json: no Hugging Face")
    with open(path, "wb") as stream:
        stream.truncate(1 << 40)
    check("larger than 268,435,456 bytes")
    path.unlink()
    os.mkfifo(path)
    check("not a regular file")
    for spec in ("./" + "x" * 5000, "~nosuchuser/tokenizer.json", "a\0.json", "~\0.json"):
        check("", spec)


HUB_NAMES = {
    "bytes": "did you mean 'byte'",
    "org/name": "out of reach",
    "a b": "nor a name on the hub",
}
LOAD_EACH = """
import sys
from simplernn_jax.data import load_tokenizer
from simplernn_jax.errors import UserError

for name in sys.argv[1:]:
    try:
        load_tokenizer(name, None)
    except UserError as error:
        print(error)
"""


def test_hub_name_out_of_reach_is_one_line_without_retries(tmp_path):
    # In a process of its own, because the hub's client reads its environment when imported.
    hub = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}
    _, output, errors = run_python("-c", LOAD_EACH, *HUB_NAMES, **hub)
    for line, (name, problem) in zip(output.splitlines(), HUB_NAMES.items(), strict=True):
        assert line.startswith(f"tokenizer {name!r}: ")
        assert problem in line
    assert "Retrying" not in errors
