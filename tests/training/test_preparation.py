"""Checks before a run starts, and finding the tokens of a saved run."""

import glob
import os
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from corrupt_files import flip_bit
from small_runs import save_untrained, small_config, write_corpus

from simplernn_jax.errors import UserError
from simplernn_jax.training.preparation import open_saved_corpus, prepare, total_steps


@pytest.fixture
def config(tmp_path):
    return small_config(source=write_corpus(tmp_path / "text"), validation_fraction=0.2)


@pytest.fixture
def workdir(tmp_path, config):
    save_untrained(config, tmp_path / "run")
    return str(tmp_path / "run")


@pytest.mark.parametrize(("vocab_size", "expected"), [(3, 259), (259, 259), (300, 300)])
def test_the_vocabulary_is_at_least_the_tokenizers(tmp_path, config, vocab_size, expected):
    config.model.vocab_size = vocab_size
    prepared, corpus, _ = prepare(config, str(tmp_path / "run"))
    assert prepared.model.vocab_size == expected
    assert corpus.tokenizer.vocab_size == 259
    assert config.model.vocab_size == vocab_size


def test_length_is_given_in_steps_or_epochs(tmp_path, config):
    _, corpus, _ = prepare(config, str(tmp_path / "run"))
    assert total_steps(config, corpus) == 40
    config.train.steps, config.train.epochs = 0, 2.5
    per_epoch = -(-len(corpus.train.tokens) // (2 * 7))
    assert total_steps(config, corpus) == int(np.ceil(2.5 * per_epoch))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "stream"}, "settings: config.data.mode is 'stream', checkpoint has 'window'"),
        ({"seed": 5}, "config.train.seed is 5, checkpoint has 0"),
        ({"name": "muon"}, "config.optimizer.name is 'muon', checkpoint has 'adamw'"),
        ({"num_layers": 2, "key_dim": 4}, "has 1; config.model.key_dim is 4, checkpoint has 8"),
    ],
)
def test_changes_that_prevent_a_resume_are_named(workdir, config, fields, message):
    changed = small_config(
        source=config.data.source, validation_fraction=config.data.validation_fraction, **fields
    )
    with pytest.raises(UserError, match=message):
        prepare(changed, workdir)


def test_length_intervals_rates_and_names_may_change(workdir, config):
    changed = small_config(
        source=config.data.source + "/.",  # the same text by another name
        validation_fraction=config.data.validation_fraction,
        steps=99,
        profile_steps=3,
        learning_rate=5.0,
        cache_dir=workdir + "-tokens",
    )
    resumed = prepare(changed, workdir)[0]
    assert resumed.train == changed.train
    assert resumed.optimizer == changed.optimizer


def test_another_source_is_rejected_before_it_is_tokenized(tmp_path, monkeypatch, workdir, config):
    own = config.data.source
    for source in ("stdlib", write_corpus(tmp_path / "other", seed=1)):
        config.data.source = source
        problem = (
            rf"run was trained on --config\.data\.source={own}, not {source}; pass that, omit "
        )
        with pytest.raises(UserError, match=problem):
            prepare(config, workdir)
    assert len(list((tmp_path / "run" / "tokens").glob("[!.]*"))) == 1
    monkeypatch.chdir(tmp_path)
    config.data.source = "text"  # the same by another name
    assert prepare(config, workdir)[0].data.source == own
    os.rename(own, tmp_path / "moved")
    config.data.source = "moved"
    assert prepare(config, workdir)[0].data.source == str(tmp_path / "moved")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("text", "{here}/text"),
        ("./text/*/../?.txt", "{escaped}/./text/*/../?.txt"),
        ("text/:0.70,stdlib:1,t*/*.txt:2", "{here}/text:0.70,stdlib:1,{escaped}/t*/*.txt:2"),
    ],
)
def test_paths_of_a_source_are_saved_as_absolute(tmp_path, monkeypatch, config, source, expected):
    here = tmp_path / "[1] folder"
    (here / "text" / "deep").mkdir(parents=True)
    for name in ("library.py", "text/1.txt"):
        (here / name).write_text("abc " * 99)
    monkeypatch.chdir(here)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(here))
    config.data.source = source
    first, corpus, _ = prepare(config, str(tmp_path / "run"))
    assert first.data.source == expected.format(here=here, escaped=glob.escape(str(here)))
    monkeypatch.chdir("/")  # where the saved configuration gives the same text
    again, same, _ = prepare(first, str(tmp_path / "run"))
    assert (again, same.content_hash) == (first, corpus.content_hash)


def test_preparing_verifies_the_configuration_but_no_arrays(workdir, config):
    checkpoint = Path(workdir) / "checkpoints" / "1"
    arrays = max((checkpoint / "state").rglob("*"), key=lambda path: path.stat().st_size)
    for damaged in (arrays, checkpoint / "tokenizer" / "metadata"):
        prepare(config, workdir)
        flip_bit(damaged)
    with pytest.raises(UserError, match="no intact checkpoint is left"):
        prepare(config, workdir)


def test_the_tokens_of_a_run_are_found_without_their_source(tmp_path, config):
    expected = save_untrained(config, tmp_path / "run")
    # Another corpus beside it, and an unrelated file.
    other = small_config(source=write_corpus(tmp_path / "other", seed=1))
    other.data.cache_dir = str(tmp_path / "run" / "tokens")
    save_untrained(other, tmp_path / "other_run")
    (tmp_path / "run" / "tokens" / "notes.txt").write_text("mine")
    shutil.rmtree(config.data.source)
    os.rename(tmp_path / "run", tmp_path / "moved")
    corpus = open_saved_corpus(str(tmp_path / "moved"))
    assert corpus.content_hash == expected.content_hash
    np.testing.assert_array_equal(corpus.train.tokens, expected.train.tokens)
    assert corpus.validation is not None
    assert corpus.tokenizer.to_json() == expected.tokenizer.to_json()


def test_a_workdir_inside_its_source_is_no_part_of_it(tmp_path, monkeypatch):
    write_corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = small_config(source=".", cache_dir="tokens")
    expected = prepare(config, "run")[1].content_hash
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    shutil.rmtree(tmp_path / "tokens")
    assert prepare(config, "run")[1].content_hash == expected


def test_tokens_elsewhere_are_found_by_cache_dir_alone(tmp_path, config, monkeypatch):
    """A path in a checkpoint is never opened."""
    monkeypatch.chdir(tmp_path)
    config.data.cache_dir = str(tmp_path / "elsewhere")
    expected = save_untrained(config, tmp_path / "run")
    shutil.rmtree(config.data.source)
    corpus = open_saved_corpus(str(tmp_path / "run"), cache_dir="elsewhere")
    assert corpus.content_hash == expected.content_hash
    problem = r"run/tokens: not found; pass --cache_dir, originally .*elsewhere, or --corpus_sou"
    with pytest.raises(UserError, match=problem):
        open_saved_corpus(str(tmp_path / "run"))


def test_deleted_tokens_are_not_recomputed_from_another_text(tmp_path, config, workdir):
    shutil.rmtree(tmp_path / "run" / "tokens")
    write_corpus(tmp_path / "text", seed=1)
    with pytest.raises(
        UserError, match=r"--corpus_source=.*: not the text that the run in .* was trained"
    ):
        open_saved_corpus(workdir, source=config.data.source)
    shutil.rmtree(config.data.source)
    with pytest.raises(UserError, match=f"^{config.data.source}: "):
        open_saved_corpus(workdir, source=config.data.source)


def test_corrupt_tokens_are_recomputed_or_named(tmp_path, config, workdir):
    (tokens,) = (tmp_path / "run" / "tokens").glob("*/validation.tokens")
    tokens.write_bytes(bytes(tokens.stat().st_size))
    problem = r"text is corrupted: .*: the validation split was changed; .* or --corpus_source"
    with pytest.raises(UserError, match=problem):
        open_saved_corpus(workdir)
    assert tokens.exists()
    assert open_saved_corpus(workdir, source=config.data.source).validation.tokens.any()


def test_a_validation_split_without_a_target_is_rejected_before_training(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 1009)
    config = small_config(source=str(tmp_path / "a.txt"), validation_fraction=0.0005)
    with pytest.raises(UserError, match="nothing to score: the validation split has 1 token and"):
        prepare(config, str(tmp_path / "run"))
