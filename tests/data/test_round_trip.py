"""Tokenizers that lose text are rejected with the first difference."""

import pytest
from small_tokenizers import byte_level, word_level
from tokenizers import normalizers

from simplernn_jax.config import DataConfig
from simplernn_jax.data import prepare_corpus
from simplernn_jax.errors import UserError


@pytest.fixture
def prepare(tmp_path):
    text = "First line\nsecond ﬁne — Zeile ä\x1b" + "x" * 50
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("First")
    (tmp_path / "in" / "b.txt").write_text(text, encoding="utf-8")

    def with_tokenizer(tokenizer, cache="cache"):
        path = tmp_path / "tokenizer.json"
        tokenizer.save(str(path))
        config = DataConfig(source=str(tmp_path / "in"), tokenizer=str(path))
        return prepare_corpus(config, 0, str(tmp_path / cache))

    return with_tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "difference"),
    [
        (byte_level(normalizers.Lowercase()), r"'First' comes back as 'first' at character 0 in a"),
        (byte_level(add_prefix_space=True), r"'First' comes back as ' First' at character 0 in a"),
        (
            byte_level(normalizers.NFKC()),
            r"'.*second ﬁne .*' comes back as '.*second fine .*' at character 18 in b",
        ),
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
    with pytest.raises(UserError, match=rf"tokenizer\.json: loses text: {difference}") as raised:
        prepare(tokenizer)
    assert len(str(raised.value)) <= 400
    assert not (tmp_path / "cache").exists()


def test_only_the_sample_is_checked(prepare, monkeypatch):
    monkeypatch.setattr("simplernn_jax.data.tokenizer._SAMPLE_CHARACTERS", 15)
    prepare(byte_level(normalizers.NFKC()))
    monkeypatch.setattr("simplernn_jax.data.tokenizer._SAMPLE_CHARACTERS", 24)
    with pytest.raises(UserError, match="loses text"):
        prepare(byte_level(normalizers.NFKC()))
