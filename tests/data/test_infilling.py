"""Text presented for filling in the middle: what stays, what is a target, and prompts."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import bpe_of, char_tokenizer

from simplernn_jax.data import load_tokenizer, tokenizer_from_json
from simplernn_jax.data.infilling import infill_ids, present
from simplernn_jax.data.tokenizer import InfillingTokenizer, ids_without_text
from simplernn_jax.errors import UserError

TEXT = "".join(f"def f{n}(ä):\n    return {'x' * (n % 50)}\n\n" for n in range(700))
BYTES = InfillingTokenizer(load_tokenizer("byte"), "suffix_first")
SUFFIX, PREFIX, MIDDLE = BYTES.fim_ids
BOS, EOS = BYTES.bos_id, BYTES.eos_id


def restored(ids, order="suffix_first"):
    """The text of presented bytes in its order, and its prefixes, middles and suffixes."""
    text, found, at = bytearray(), [], 0
    first, second = (SUFFIX, PREFIX) if order == "suffix_first" else (PREFIX, SUFFIX)
    ids = ids.tolist()
    while at < len(ids):
        if ids[at] != first:
            text.append(ids[at])
            at += 1
            continue
        cuts = [at, ids.index(second, at), ids.index(MIDDLE, at), ids.index(EOS, at)]
        parts = [bytes(ids[a + 1 : b]) for a, b in itertools.pairwise(cuts)]
        suffix, prefix = parts[:2] if first == SUFFIX else parts[1::-1]
        found.append((prefix, parts[2], suffix))
        text += prefix + parts[2] + suffix
        at = cuts[-1] + 1
    return bytes(text).decode(), found


@pytest.mark.parametrize("order", ["suffix_first", "prefix_first"])
def test_every_byte_of_the_text_is_presented_once(order):
    tokenizer = InfillingTokenizer(load_tokenizer("byte"), order)
    ids = present(tokenizer, TEXT, 0.5, 0)
    text, found = restored(ids, order)
    assert text == TEXT
    of_infilling = sum(len(b"".join(parts)) for parts in found)
    assert 0.3 < of_infilling / len(TEXT.encode()) < 0.7


def test_places_of_the_cursor_are_those_of_completion():
    _, found = restored(present(BYTES, TEXT * 3, 1.0, 0))
    lengths = [len(b"".join(parts)) for parts in found]
    is_line = [b"\n" not in middle and suffix[:1] in (b"\n", b"") for _, middle, suffix in found]
    assert max(lengths) <= 2048 * 1.1  # characters, of which some are two bytes
    assert 500 < np.mean(lengths) < 1500
    assert 0.5 < np.mean(is_line) < 0.8
    for part in range(3):
        assert 0.01 < np.mean([not parts[part] for parts in found]) < 0.3


def test_draws_follow_from_the_seed_and_the_text():
    first, again, other = (present(BYTES, TEXT, 0.5, seed) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()
    assert present(BYTES, "", 0.5, 0).tolist() == []


@given(text=st.text(max_size=300), rate=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_any_text_is_presented(text, rate, seed):
    ids = present(BYTES, text, rate, seed)
    assert restored(ids)[0] == text
    assert ids.dtype == np.int32


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
        *(BOS, *b"xy", SUFFIX, *b"\nc", PREFIX, *b"a\nb", MIDDLE)
    ]
    first = infill_ids(InfillingTokenizer(BYTES.base, "prefix_first"), "a", "c")
    assert first.tolist() == [BOS, PREFIX, *b"a", SUFFIX, *b"c", MIDDLE]
    before, moved = infill_ids(BYTES, "", TEXT), 0
    for end in range(1, 5000):
        ids = infill_ids(BYTES, TEXT[:end].replace("ä", "a"), TEXT)
        assert ids.tolist().index(MIDDLE) - ids.tolist().index(PREFIX) <= 2048 + 1024
        moved += ids[: len(before) - 1].tolist() != before[:-1].tolist()
        before = ids
    assert moved == 3  # where the prefix passes a multiple of 1,024
    assert len(infill_ids(BYTES, "", "y" * 10**5)) == 4 + 1024
    with pytest.raises(UserError, match="does not fill in"):
        infill_ids(BYTES.base, "a", "b")
