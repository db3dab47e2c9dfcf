"""Text presented for filling in the middle: what stays, what is a target, and prompts."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import bpe_of, char_tokenizer, contents, records, stores, write

from simplernn_jax.config import Config, DataConfig, validate
from simplernn_jax.data import load_tokenizer, prepare_corpus, tokenizer_from_json
from simplernn_jax.data.infilling import infill_ids, present
from simplernn_jax.data.tokenizer import InfillingTokenizer, ids_without_text
from simplernn_jax.errors import UserError
from simplernn_jax.files import sha256_hex
from simplernn_jax.training.preparation import tokenize_source

TEXT = "".join(f"def f{n}(ä):\n    return {'x' * (n % 50)}\n\n" for n in range(700))
BYTES = InfillingTokenizer(load_tokenizer("byte"), "suffix_first")
SUFFIX, PREFIX, MIDDLE = BYTES.fim_ids
BOS, EOS = BYTES.bos_id, BYTES.eos_id


def restored(ids):
    """The text of presented bytes in its order, and its prefixes, middles and suffixes."""
    text, found, at = bytearray(), [], 0
    ids = ids.tolist()
    while at < len(ids):
        if ids[at] != PREFIX:
            text.append(ids[at])
            at += 1
            continue
        cuts = [ids.index(mark, at) for mark in (PREFIX, SUFFIX, MIDDLE, EOS)]
        # With the suffix first, the middle continues the prefix.
        prefix, suffix, middle = (bytes(ids[a + 1 : b]) for a, b in itertools.pairwise(cuts))
        found.append((prefix, middle, suffix))
        text += prefix + middle + suffix
        at = cuts[-1] + 1
    return bytes(text).decode(), found


@pytest.mark.parametrize("order", ["suffix_first", "prefix_first"])
def test_every_byte_of_the_text_is_presented_once(order):
    tokenizer = InfillingTokenizer(load_tokenizer("byte"), order)
    ids = present(tokenizer, TEXT, 0.5, 0)
    assert ids.tolist() != present(tokenizer, TEXT, 0.5, 1).tolist()
    if order == "suffix_first":  # if it changes, so must `_FIM_FORMAT`
        assert sha256_hex(ids.tobytes()).startswith("e4425ccfbf8d95a7")
    text, found = restored(ids)
    assert any(prefix for prefix, *_ in found) == (order == "prefix_first")
    assert text == TEXT
    of_infilling = sum(len(b"".join(parts)) for parts in found)
    assert 0.3 < of_infilling / len(TEXT.encode()) < 0.7


def test_places_of_the_cursor_are_those_of_completion():
    tokenizer = InfillingTokenizer(BYTES.base, "prefix_first")
    _, found = restored(present(tokenizer, TEXT * 3, 1.0, 0))
    lengths = [len(b"".join(parts)) for parts in found]
    is_line = [b"\n" not in middle and suffix[:1] in (b"\n", b"") for _, middle, suffix in found]
    assert max(lengths) <= 768 * 1.1  # characters, of which some are two bytes
    assert 250 < np.mean(lengths) < 500
    assert 0.5 < np.mean(is_line) < 0.8
    for part in range(3):
        assert 0.01 < np.mean([not parts[part] for parts in found]) < 0.3


@given(text=st.text(max_size=300), rate=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_any_text_is_presented(text, rate, seed):
    ids = present(BYTES, text, rate, seed)
    assert restored(ids)[0] == text
    assert ids.tolist() == present(BYTES, text, rate, seed).tolist()


@pytest.mark.parametrize("base", [load_tokenizer("byte"), char_tokenizer("abc\n"), bpe_of(TEXT)])
def test_ids_of_infilling_come_after_any_tokenizer_and_stand_for_no_text(base):
    tokenizer = tokenizer_from_json(InfillingTokenizer(base, "prefix_first").to_json())
    assert tokenizer.order == "prefix_first"
    assert base.fim_ids is None
    assert tokenizer.fim_ids == tuple(range(base.vocab_size, base.vocab_size + 3))
    assert tokenizer.vocab_size == base.vocab_size + 3
    ids = tokenizer.encode("abba\n")
    assert ids.tolist() == base.encode("abba\n").tolist()
    assert tokenizer.decode([*tokenizer.fim_ids, *ids, *tokenizer.fim_ids]) == "abba\n"
    assert ids_without_text(tokenizer, tokenizer.vocab_size) >= {*tokenizer.fim_ids}
    nested = {"kind": "fim", "order": "suffix_first", "base": tokenizer.to_json()}
    with pytest.raises(UserError, match="corrupted"):
        tokenizer_from_json(json.dumps(nested))


def test_prompt_is_the_presentation_of_training_and_grows_at_its_end():
    assert infill_ids(BYTES, "a\nb", "\nc", ["x", "y"]).tolist() == [
        *(BOS, *b"xy", PREFIX, SUFFIX, *b"\nc", MIDDLE, *b"a\nb")
    ]
    first = infill_ids(InfillingTokenizer(BYTES.base, "prefix_first"), "a", "c")
    assert first.tolist() == [BOS, PREFIX, *b"a", SUFFIX, *b"c", MIDDLE]
    before, moved = infill_ids(BYTES, "", TEXT), 0
    for end in range(1, 1300, 7):
        ids = infill_ids(BYTES, TEXT[:end].replace("ä", "a"), TEXT)
        assert len(ids) - ids.tolist().index(MIDDLE) <= 768
        moved += ids[: len(before)].tolist() != before.tolist()
        before = ids
    assert moved == 4  # where the prefix passes a multiple of 256, from 512 on
    assert len(infill_ids(BYTES, "", "y" * 10**5)) == 4 + 384
    with pytest.raises(UserError, match="does not fill in"):
        infill_ids(BYTES.base, "a", "b")


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A folder of documents, one of which has several pieces."""
    monkeypatch.setattr("simplernn_jax.data.corpora.PIECE_SIZE", 1 << 16)
    for number, length in enumerate((70, 9000, 1, 150_000, 5000, 400)):
        write(tmp_path / "in" / f"{number}.txt", (TEXT * 6)[number : number + length])
    return tmp_path / "in"


def prepare(source, cache, **settings):
    config = DataConfig(source=str(source), validation_fraction=0.3, **settings)
    return prepare_corpus(config, 3, str(cache))


def test_documents_of_a_store_have_all_text_and_targets_but_ids_of_infilling(source, tmp_path):
    corpus = prepare(source, tmp_path / "cache", fim_rate=0.5)
    texts = []
    for split in (corpus.train, corpus.validation):
        num_bytes = 0
        ends = [*split.document_starts[1:], len(split.tokens)]
        for start, end in zip(split.document_starts, ends, strict=True):
            tokens = split.tokens[start:end]
            assert (tokens[0], tokens[-1]) == (BOS, EOS)
            is_target = ~np.isin(tokens, (BOS, *BYTES.fim_ids))
            assert split.targets[start:end].tolist() == is_target.tolist()
            last = np.flatnonzero(tokens == MIDDLE)[-1:]
            is_open = last.size and EOS not in tokens[last[0] : -1]
            texts.append(restored(tokens[1 : None if is_open else -1])[0])
            num_bytes += len(texts[-1].encode())
            assert EOS in tokens[:-1] or len(tokens) < 500
        assert split.num_bytes == num_bytes
    assert sorted(texts) == sorted(path.read_text("utf-8") for path in source.iterdir())
    (source / "3.txt").write_text(TEXT)  # records of JSON are cut by characters
    same = [{"text": path.read_text("utf-8")} for path in sorted(source.iterdir())]
    write(tmp_path / "same.jsonl", records(*same))
    hashes = {
        prepare(path, tmp_path / "cache", fim_rate=0.5).content_hash
        for path in (source, tmp_path / "same.jsonl")
    }
    assert len(hashes) == 1


def test_processes_present_text_alike(source, tmp_path, monkeypatch):
    monkeypatch.setattr("simplernn_jax.data.tokenization.PART_CHARACTERS", 10_000)
    for cores in (1, 3):
        monkeypatch.setattr("simplernn_jax.data.tokenization.available_cores", lambda n=cores: n)
        prepare(source, tmp_path / str(cores), fim_rate=1.0, tokenizer="byte")
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_each_rate_and_order_has_its_store_and_plain_text_none_of_it(source, tmp_path):
    cache = tmp_path / "cache"
    plain = prepare(source, cache)
    assert plain.tokenizer.fim_ids is None
    assert plain.train.targets is None
    for settings in ({"fim_rate": 0.5}, {"fim_rate": 0.6}, {"fim_order": "prefix_first"}):
        prepare(source, cache, **{"fim_rate": 0.5} | settings)
    assert len(stores(cache)) == 4
    bpe = prepare(source, cache, fim_rate=0.5, tokenizer="bpe:300")
    assert json.loads(bpe.tokenizer.base.to_json())["tokenizer"].strip() == (
        prepare(source, cache, tokenizer="bpe:300").tokenizer.tokenizer_json.strip()
    )


def test_other_text_is_scored_as_it_is(source, tmp_path):
    config = Config(data=DataConfig(source=str(source), fim_rate=1.0))
    split = tokenize_source(str(source / "1.txt"), config, BYTES)
    assert split.targets is None
    assert bytes(split.tokens[1:-1].tolist()).decode() == (source / "1.txt").read_text("utf-8")


def test_what_cannot_be_filled_in_is_one_line(source, tmp_path):
    with pytest.raises(UserError, match=r"data\.fim_rate=0\.5.* 0 with config\.data\.template"):
        validate(Config(data=DataConfig(fim_rate=0.5, template="roles")))
    config = DataConfig(source=str(source), fim_rate=0.5)
    with pytest.raises(UserError, match=r"fim_rate=0\.5: the model to start from was not trained"):
        prepare_corpus(config, 0, str(tmp_path / "cache"), tokenizer=BYTES.base)
