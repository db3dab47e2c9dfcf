"""Mixtures of sources, from their names to batches and a resumed run."""

import dataclasses
import json
import re

import chex
import numpy as np
import pytest
from processes import ROOT, run_scripts
from small_data import PAD, make_split
from small_runs import save_untrained, small_config

from simplernn_jax.config import DataConfig
from simplernn_jax.data import open_corpus, prepare_corpus
from simplernn_jax.data.batches import BatchSource, make_batches, steps_per_epoch
from simplernn_jax.data.corpora import parse_mixture
from simplernn_jax.data.store_files import CorruptStore
from simplernn_jax.data.token_split import union
from simplernn_jax.data.token_store import find_corpus, train_tokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.export.exporting import without_paths
from simplernn_jax.files import read_sealed, write_sealed
from simplernn_jax.training.preparation import open_saved_corpus

VARIANTS = [
    {"mode": "window"},  # random positions
    {"mode": "window", "stride": 7},
    {"mode": "stream", "reset_probability": 0.3},
    {"mode": "document"},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Current folder with seven documents of "a" in ``a`` and five records of "b"."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    for i in range(7):
        (tmp_path / "a" / f"{i}.txt").write_text(f"{i}" + "a" * (31 + i))
    lines = [json.dumps({"text": "b" * 61 + f"{i}"}) for i in range(5)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    return tmp_path


def prepare(source, **settings):
    settings = {"validation_fraction": 0.3} | settings
    return prepare_corpus(DataConfig(source=source, **settings), 3, "cache")


def mixed(weights, lengths=((31, 7, 101), (12, 43), (61,))):
    """A mixture of splits whose tokens tell their source: 0 to 9, 10 to 19, ..."""
    splits = []
    for number, _ in enumerate(weights):
        split = make_split(lengths[number])
        tokens = np.where(split.tokens < 200, split.tokens % 10 + 10 * number, split.tokens)
        splits.append(dataclasses.replace(split, tokens=tokens))
    return union("train", splits, "abc"[: len(weights)], weights)


def sources_of(batch):
    """The source of each sequence; a mixture within one would be an error."""
    found = []
    for tokens in batch.tokens:
        (source,) = {int(token) // 10 for token in tokens if token < 200}
        found.append(source)
    return found


def config_of(batch_size=8, **fields):
    return DataConfig(batch_size=batch_size, sequence_length=11, **fields)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a/:0.7,b.jsonl:0.3", [("a/", 0.7), ("b.jsonl", 0.3)]),
        ("a:1,b:3", [("a", 0.25), ("b", 0.75)]),
        ("a:0,stdlib:2e3", [("a", 0.0), ("stdlib", 1.0)]),
        ("tfds:x:1.0.0:1,b,c:d:1", [("tfds:x:1.0.0", 0.5), ("b,c:d", 0.5)]),
        ("a/", None),
        ("{a,b}/*.txt", None),
    ],
)
def test_sources_and_weights(source, expected):
    assert parse_mixture(source) == expected


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("a:nan,b:1", "a weight is negative or not finite"),
        ("a:1,b:x", "no weight for b:x"),
        ("a:0,b:0.0", "the sum of the weights is 0"),
    ],
)
def test_bad_weights_are_rejected(source, problem):
    with pytest.raises(UserError, match=f"data.source={source}: {problem}.* such as 'a/:0.7,"):
        parse_mixture(source)


def test_a_path_that_exists_is_that_path(folder):
    (folder / "a:0.7,b.jsonl:0.3").write_text("one document\n" * 9)
    corpus = prepare("a:0.7,b.jsonl:0.3")
    assert not corpus.train.parts
    assert corpus.tokenizer.decode(corpus.train.tokens).startswith("one document")
    with pytest.raises(UserError, match="a mixture, which only training takes; give one source"):
        open_corpus(DataConfig(source="a:1,b.jsonl:1"))


def test_each_source_has_the_store_that_it_has_alone(folder):
    alone = [prepare(source) for source in ("a", "b.jsonl")]
    stores = set((folder / "cache").iterdir())
    corpus = prepare("a:3,b.jsonl:1")
    (record,) = set((folder / "cache").iterdir()) - stores
    assert record.name.startswith(".corpus-")
    for name in ("train", "validation"):
        union, parts = getattr(corpus, name), [getattr(one, name) for one in alone]
        assert union.weights == (0.75, 0.25)
        np.testing.assert_array_equal(union.tokens, np.concatenate([p.tokens for p in parts]))
        begins = np.flatnonzero(np.asarray(union.tokens) == corpus.tokenizer.bos_id)
        np.testing.assert_array_equal(union.document_starts, begins)
        assert union.num_bytes == sum(part.num_bytes for part in parts)
        assert union.num_predictions == sum(part.num_predictions for part in parts)
    assert prepare("a:6,b.jsonl:2").content_hash == corpus.content_hash
    for other in ("a:1,b.jsonl:1", "b.jsonl:1,a:3"):
        assert prepare(other).content_hash != corpus.content_hash


@pytest.mark.parametrize(("place", "value"), [(1, [["a", 1.0]]), (0, ["..", "."])])
def test_a_mixture_is_found_by_its_content(folder, place, value):
    corpus = prepare("a:3,b.jsonl:1")
    path = folder / "cache" / f".corpus-{corpus.content_hash[:32]}.json"
    prepare("a:1,b.jsonl:1")
    assert find_corpus("cache", "../" + corpus.content_hash, corpus.tokenizer) is None

    def find():
        return find_corpus("cache", corpus.content_hash, corpus.tokenizer)

    found = find()
    assert found.content_hash == corpus.content_hash
    assert [part.name for part in found.train.parts] == ["a train", "b.jsonl train"]
    assert found.train.weights == (0.75, 0.25)
    np.testing.assert_array_equal(found.train.tokens, corpus.train.tokens)
    record = json.loads(read_sealed(path))
    path.write_text(path.read_text().replace("a", "c"))
    with pytest.raises(CorruptStore, match="was changed"):
        find()
    record[place] = value
    write_sealed(path, json.dumps(record) + "\n")
    with pytest.raises(CorruptStore, match="belongs to other stores"):
        find()
    assert prepare("a:3,b.jsonl:1").content_hash == find().content_hash


def test_a_source_that_is_learned_whole_beside_one_that_is_not(folder):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "cc"}]
    (folder / "chat.jsonl").write_text(json.dumps({"messages": chat}))
    answers, whole = (
        prepare("chat.jsonl", template="roles", loss_mask=loss_mask, validation_fraction=0.0)
        for loss_mask in ("assistant", "all")
    )
    split = union("train", [answers.train, whole.train], ("answers", "whole"), (0.5, 0.5))
    expected = np.concatenate([answers.train.tokens[answers.train.targets], whole.train.tokens[1:]])
    np.testing.assert_array_equal(np.array(split.tokens)[np.array(split.targets)], expected)
    assert split.num_predictions == len(expected)


@pytest.mark.parametrize("tokenizer", ["char", "bpe:270"])
def test_the_tokenizer_knows_every_source(folder, tokenizer):
    corpus = prepare("a:1,b.jsonl:1", tokenizer=tokenizer)
    if tokenizer == "char":
        assert corpus.tokenizer.vocab_size == len("ab0123456") + 3
    for text in ("aaaa", "bbbb"):
        assert len(corpus.tokenizer.encode(text)) == (4 if tokenizer == "char" else 1)


def test_a_bpe_takes_from_each_source_by_its_weight(folder, monkeypatch):
    monkeypatch.setattr("simplernn_jax.data.pretrained_tokenizer.MAX_TRAINING_BYTES", 120)
    config = DataConfig(tokenizer="bpe:300", validation_fraction=0.0)
    config.source = "a:0,b.jsonl:1"
    only_b = train_tokenizer(config, 3, "cache")
    assert len(only_b.encode("aaaa")) == 4
    config.source = "a:1,b.jsonl:1"
    assert len(train_tokenizer(config, 3, "cache").encode("aaaa")) == 1


def test_sequences_are_drawn_with_the_probabilities(folder):
    split = mixed((0.625, 0.125, 0.25))
    source = BatchSource(split, config_of(), 0, PAD)
    found = np.concatenate([sources_of(source[index]) for index in range(500)])
    shares = np.bincount(found) / len(found)
    # Four standard errors of the share of 4,000 draws.
    np.testing.assert_allclose(shares, split.weights, atol=4 * np.sqrt(0.25 / 4000))
    chex.assert_trees_all_equal(source[7], BatchSource(split, config_of(), 0, PAD)[7])
    other = BatchSource(split, config_of(), 1, PAD)[7]
    assert (other.tokens != source[7].tokens).any()
    tokens = sum(len(part.tokens) for part in split.parts)  # of an epoch
    assert steps_per_epoch(split, config_of()) == -(-tokens // (8 * 11))


@pytest.mark.parametrize("fields", VARIANTS[1:])
def test_other_modes_divide_the_sequences_and_pass_through_each_source(fields):
    split = mixed((0.6, 0.4))
    config = config_of(5, **fields)
    source = BatchSource(split, config, 0, PAD)
    alone = [
        BatchSource(part, config_of(count, **fields), 0, PAD)
        for part, count in zip(split.parts, (3, 2), strict=True)
    ]
    for index in range(20):
        expected = [
            np.concatenate(pair) for pair in zip(*(one[index] for one in alone), strict=True)
        ]
        chex.assert_trees_all_equal(list(source[index]), expected)


@pytest.mark.parametrize("weights", [(1.0,), (0.4, 0.2, 0.4)])
@pytest.mark.parametrize("fields", VARIANTS)
def test_each_process_makes_its_own_sequences(fields, weights):
    split = mixed(weights)
    config = config_of(8, **fields)
    whole = BatchSource(split, config, 0, PAD)
    parts = [BatchSource(split, config, 0, PAD, part) for part in (slice(0, 3), slice(3, 8))]
    for index in range(9):
        own = [part[index] for part in parts]
        together = [np.concatenate(pair) for pair in zip(*own, strict=True)]
        chex.assert_trees_all_equal(list(whole[index]), together)


@pytest.mark.parametrize(
    ("weights", "fields", "problem"),
    [
        ((0.99, 0.01), {"mode": "stream"}, "the b train split has a probability of 0.01, less"),
        ((0.5, 0.5), {"sequence_length": 60}, "the b train split has 59 tokens, and"),
    ],
)
def test_a_source_without_a_sequence_is_rejected(weights, fields, problem):
    config = DataConfig(**{"batch_size": 8, "sequence_length": 11} | fields)
    with pytest.raises(UserError, match=problem):
        make_batches(mixed(weights), config, 0, PAD, slice(0, 1))


def test_an_export_names_the_sources_without_their_folders():
    config = small_config(source="/home/me/a/:3,/home/me/b.jsonl:1")
    assert without_paths(config).data.source == "a:0.75,b.jsonl:0.25"
    config.data.tokenizer = "/home/me/my_tokenizer"
    assert without_paths(config).data.tokenizer == "my_tokenizer"


def test_evaluate_reports_the_union_and_each_source(folder):
    save_untrained(small_config(source="a:3,b.jsonl:1", validation_fraction=0.3), "run")
    (done,) = run_scripts((ROOT / "scripts" / "evaluate.py", "--workdir", "run"), cwd=folder)
    assert done.code == 0, done.errors
    union, first, second = (
        float(re.search(rf"{name} +([\d.]+)", done.output)[1])
        for name in ("nats/token", "a validation", r"b\.jsonl validation")
    )
    corpus = open_saved_corpus("run")
    counts = [part.num_predictions for part in corpus.validation.parts]
    assert union == pytest.approx(np.average([first, second], weights=counts), abs=2e-4)
