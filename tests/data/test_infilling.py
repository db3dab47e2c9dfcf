"""Text presented for filling in the middle: what stays, what is a target, and prompts."""

import itertools
import json
from typing import NamedTuple

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from small_data import bpe_of, char_tokenizer, stores, write
from tokenizers import decoders, models, pre_tokenizers

from simplernn_jax.config import Config, DataConfig, validate
from simplernn_jax.data import load_tokenizer, open_corpus, prepare_corpus, tokenizer_from_json
from simplernn_jax.data.infilling import Infilling, InfillPrompt, heal, present
from simplernn_jax.data.tokenizer import InfillingTokenizer, ids_without_text, token_bytes
from simplernn_jax.errors import UserError
from simplernn_jax.files import sha256_hex
from simplernn_jax.training.preparation import tokenize_source

TEXT = "".join(f"def f{n}(ä):\n    return {'x' * (n % 50)}\n\n" for n in range(700))
BYTES = InfillingTokenizer(load_tokenizer("byte"))
SUFFIX, PREFIX, MIDDLE = BYTES.fim_ids
BOS, EOS = BYTES.bos_id, BYTES.eos_id


def restored(ids):
    """The text of presented bytes in its order, and what is before and after its places."""
    text, found, at = bytearray(), [], 0
    ids = ids.tolist()
    while at < len(ids):
        if ids[at] != PREFIX:
            text.append(ids[at])
            at += 1
            continue
        cuts = [ids.index(mark, at) for mark in (PREFIX, SUFFIX, MIDDLE, EOS)]
        nothing, suffix, before = (bytes(ids[a + 1 : b]) for a, b in itertools.pairwise(cuts))
        assert not nothing
        found.append((before, suffix))
        text += before + suffix
        at = cuts[-1] + 1
    return bytes(text).decode(), found


def infilling(tokenizer):
    return Infilling(tokenizer, token_bytes(tokenizer, tokenizer.vocab_size))


@given(text=st.text(max_size=300), rate=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_every_byte_of_any_text_is_presented_once(text, rate, seed):
    ids = present(BYTES, text, rate, seed)
    assert restored(ids)[0] == text
    assert ids.tolist() == present(BYTES, text, rate, seed).tolist()


def test_places_of_the_cursor_are_those_of_completion():
    texts = []

    class Recording(InfillingTokenizer):
        def encode(self, text):
            texts.append(text)
            return super().encode(text)

    present(Recording(BYTES.base), TEXT * 3, 1.0, 0)
    found = list(zip(*(texts[start::3] for start in range(3)), strict=True))
    assert "".join(prefix + middle + suffix for prefix, suffix, middle in found) == TEXT * 3
    is_line = ["\n" not in middle and suffix[:1] in ("\n", "") for _, suffix, middle in found]
    assert 0.5 < np.mean(is_line) < 0.9
    for part in range(3):
        assert 0.01 < np.mean([not parts[part] for parts in found]) < 0.3
    half = present(BYTES, TEXT, 0.5, 0)
    # If it changes, so must `_FORMAT` of token stores.
    assert sha256_hex(half.tobytes()).startswith("67a9a2f7f385fb19")
    of_infilling = sum(len(b"".join(parts)) for parts in restored(half)[1])
    assert 0.3 < of_infilling / len(TEXT.encode()) < 0.7


@pytest.mark.parametrize("base", [load_tokenizer("byte"), char_tokenizer("abc\n"), bpe_of(TEXT)])
def test_ids_of_infilling_come_after_any_tokenizer_and_stand_for_no_text(base):
    tokenizer = tokenizer_from_json(InfillingTokenizer(base).to_json())
    assert tokenizer.fim_ids == tuple(range(base.vocab_size, tokenizer.vocab_size))
    ids = tokenizer.encode("abba\n")
    assert ids.tolist() == base.encode("abba\n").tolist()
    assert tokenizer.decode([*tokenizer.fim_ids, *ids, *tokenizer.fim_ids]) == "abba\n"
    assert ids_without_text(tokenizer, tokenizer.vocab_size) >= {*tokenizer.fim_ids}


def test_prompt_is_the_presentation_of_training_and_grows_at_its_end():
    found = infilling(BYTES).prompt("a\nb", "\nc", ["x", "y"])
    assert found.tokens.tolist() == [*(BOS, *b"xy", PREFIX, SUFFIX, *b"\nc", MIDDLE, *b"a\nb")]
    assert (found.num_optional, found.stable) == (3, (8, 9, 10, 11))
    prompt, before, moved = infilling(BYTES).prompt, np.zeros(0), 0
    assert prompt("a", "c", with_bos=False).tokens.tolist() == prompt("a", "c").tokens[1:].tolist()
    for end in range(0, 650, 7):
        ids = prompt(TEXT[:end].replace("ä", "a"), TEXT).tokens
        assert len(ids) - ids.tolist().index(MIDDLE) <= 2 * 128
        moved += ids[: len(before)].tolist() != before.tolist()
        before = ids
    assert moved == 5  # where the prefix passes a multiple of 128
    assert len(prompt("", "y" * 10**5).tokens) == 4 + 192
    with pytest.raises(UserError, match="does not fill in"):
        infilling(BYTES.base).prompt("a", "b")


@pytest.mark.parametrize(("lines", "characters"), [(256, 10**5), (900, 9000)])
def test_prompts_of_the_last_lines_or_characters_begin_alike(lines, characters):
    text, found = "".join(f"    value_{n} = {n}\n" for n in range(1500)), set()
    for start in range(0, 8000, 50):
        part = "".join(text[start:].splitlines(keepends=True)[:lines])[:characters]
        found.add(BYTES.decode(infilling(BYTES).prompt(part, "").tokens[:99]))
    assert 1 < len(found) < 20  # of 160
    assert all(start.startswith("    value_") for start in found)


def test_what_was_typed_of_a_token_is_taken_away():
    text = "def größe(x):\n    return x.größer and 'Größe'\n\nreturned = größer(value)\n" * 9
    base = bpe_of(text)
    tokenizer, found = InfillingTokenizer(base), []
    contents = [base.decode_bytes([i]) for i in range(base.vocab_size)]
    for cut in range(46):
        prompt, ids = infilling(tokenizer).prompt(text[:cut], ")\nreturn"), base.encode(text[:cut])
        end, num = prompt.stable[-1], len(prompt.typed)
        kept = ids[: len(ids) - num].tolist()
        assert prompt.tokens[end - len(kept) : end].tolist() == kept
        assert prompt.typed == (*ids[len(kept) :],)
        for index, (first_ids, length) in enumerate(
            zip(prompt.first_ids, prompt.num_typed, strict=True)
        ):
            typed = base.decode_bytes(prompt.typed[index:])
            is_like = [content.startswith(typed) for content in contents]
            assert first_ids.tolist() == np.flatnonzero(is_like).tolist()
            before = base.decode_bytes(ids[: len(kept) + index]).decode("utf-8", "ignore")
            assert text[:cut] == before + text[len(before) :][:length]
        found.append(num)
        for more in range(num + 1, min(8, len(ids)) + 1):  # no token begins with more
            typed = base.decode_bytes(ids[-more:])
            assert sum(content.startswith(typed) for content in contents) <= (more == 1)
        if num == 1:
            banned = prompt.first_ids[0][1:].tolist()  # without them, there is nothing to heal
            assert infilling(tokenizer).prompt(text[:cut], ")\nreturn", (), banned).typed == ()
    assert {0, 1, 2} <= {*found}
    assert infilling(BYTES).prompt("abc", "").typed == ()


@given(seed=st.integers(0, 2**31), num=st.integers(0, 4))
def test_the_most_probable_way_to_write_what_was_typed_is_chosen(seed, num):
    draw = np.random.default_rng(seed)
    logits = draw.normal(scale=3, size=(num + 1, 1, 9)).astype(np.float32)
    typed = draw.integers(0, 9, num).tolist()
    ids = [np.flatnonzero(draw.random(9) < 0.4) for _ in range(num)]

    class State(NamedTuple):
        index: int = 0

        @property
        def logits(self):
            return logits[self.index]

    prompt = InfillPrompt(np.zeros(1), 0, (), (*typed,), (*ids,), (1,) * num)
    state, kept, first_ids = heal(prompt, State(), lambda state, _: State(state.index + 1))
    softmax = np.exp(logits[:, 0].astype(np.float64))
    softmax /= softmax.sum(axis=1, keepdims=True)
    ways = [
        np.prod([softmax[i, typed[i]] for i in range(n)]) * softmax[n, ids[n]].sum()
        for n in range(num)
    ]
    assert state.index == kept
    if not any(map(len, ids)):
        assert (kept, first_ids) == (0, None)
    else:
        assert ways[kept] == pytest.approx(max(ways))
        assert first_ids is ids[kept]


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A folder of documents, one of which has several pieces."""
    monkeypatch.setattr("simplernn_jax.data.corpora.PIECE_SIZE", 1 << 14)
    for number, length in enumerate((70, 9000, 1, 30_000, 400)):
        write(tmp_path / "in" / f"{number}.txt", TEXT[number : number + length])
    return tmp_path / "in"


def prepare(source, cache, **settings):
    config = DataConfig(source=str(source), validation_fraction=0.3, **settings)
    return prepare_corpus(config, 3, str(cache))


@pytest.mark.parametrize("cores", [1, 2])
def test_a_store_has_the_documents_as_presented(source, tmp_path, monkeypatch, cores):
    """By any number of processes; all tokens are targets but BOS and the ids of infilling."""
    monkeypatch.setattr("simplernn_jax.data.tokenization.PART_CHARACTERS", 1000)
    monkeypatch.setattr("simplernn_jax.data.tokenization.available_cores", lambda: cores)
    expected = {}
    for name, piece in open_corpus(DataConfig(source=str(source))).pieces():
        expected.setdefault(name, []).extend(present(BYTES, piece.text, 0.5, 3).tolist())
    corpus, found = prepare(source, tmp_path / "cache", fim_rate=0.5), []
    for split in (corpus.train, corpus.validation):
        assert split.targets.tolist() == (~np.isin(split.tokens, (BOS, *BYTES.fim_ids))).tolist()
        found += np.split(split.tokens, split.document_starts[1:])
    assert sorted(tokens.tolist() for tokens in found) == sorted(
        [BOS, *tokens, *([] if tokens[-1] == EOS else [EOS])] for tokens in expected.values()
    )
    assert sum(split.num_bytes for split in (corpus.train, corpus.validation)) == sum(
        path.stat().st_size for path in source.iterdir()
    )


def test_each_rate_has_its_store_and_plain_text_none_of_it(source, tmp_path):
    cache = tmp_path / "cache"
    plain = prepare(source, cache)
    assert (plain.tokenizer.fim_ids, plain.train.targets) == ((), None)
    for rate in (0.5, 0.6):
        prepare(source, cache, fim_rate=rate)
    assert len(stores(cache)) == 3
    bpe = prepare(source, cache, fim_rate=0.5, tokenizer="bpe:300")
    assert json.loads(bpe.tokenizer.base.to_json())["tokenizer"].strip() == (
        prepare(source, cache, tokenizer="bpe:300").tokenizer.tokenizer_json.strip()
    )


def test_other_text_is_scored_as_it_is(source):
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
    vocabulary = [("<u>", 0.0), ("a", -1.0), ("\u2581", -1.0)]
    metaspace = tokenizers.Tokenizer(models.Unigram(vocabulary, 0))
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    metaspace.decoder = decoders.Metaspace(prepend_scheme="always")
    metaspace.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "a.txt", "a aa")
    fields = {"source": str(tmp_path / "a.txt"), "tokenizer": str(tmp_path / "tokenizer.json")}
    prepare_corpus(DataConfig(**fields), 0, str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"'a aa' comes back as 'a  aa' at character 2"):
        prepare_corpus(DataConfig(**fields, fim_rate=0.5), 0, str(tmp_path / "cache"))
