"""What ``scripts/benchmark.py scaling`` computes, at tiny sizes: results, never a time."""

import copy
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from small_runs import small_config, write_corpus

from benchmarks import scaling, scaling_memory, scaling_parts, short_training
from simplernn_jax import config as config_lib

BATCH, LENGTH = 8, 8


def tiny_run(folder, **fields):
    sizes = {"batch_size": BATCH, "sequence_length": LENGTH, "steps": 3, "eval_tokens": 300}
    options = {"source": write_corpus(folder, documents=30), "validation_fraction": 0.3}
    return small_config(**(sizes | options | fields))


def in_this_process(function, environment=None, **given):
    return function(**given)


def test_every_training_is_possible_and_set_against_the_plain_one(monkeypatch, capsys):
    seen = []

    def train(config, workdir, **options):
        config_lib.validate(config)
        seen.append(copy.deepcopy(config))
        measured = {"memory_mb": 1.5, "tokens_per_s": 1000.0, "loss": 2 + len(seen) / 100}
        return short_training.Trained(None, None, measured)

    def train_apart(function, environment, config, workdir):
        assert function is short_training.measure_short
        assert "device_count=2" in environment["XLA_FLAGS"]
        return train(config_lib.from_json(config), workdir).measured

    monkeypatch.setattr(scaling, "train_short", train)
    monkeypatch.setattr(scaling, "call_isolated", train_apart)
    monkeypatch.setattr(scaling_parts, "eager_step", lambda _: {"name": "C eager", "changes": "x"})
    rows, _ = scaling.compare(scaling.small_run(), "unused")
    differences = [row["loss_difference"] for row in rows if "loss_difference" in row]
    np.testing.assert_allclose(differences, np.arange(1, len(seen)) / 100)
    assert {config.data.batch_size * config.data.sequence_length for config in seen} == {
        scaling.BATCH * scaling.LENGTH
    }
    # Each differs from the plain run, but for those that differ in how the recurrence is computed
    # and in the draw, of which there are two.
    assert sum(config == seen[0] for config in seen[1:]) == 4
    assert {row["name"][0] for row in rows} == set("=ABCDE+")
    scaling._show(rows, 409_600)
    assert "409,600 tokens" in capsys.readouterr().out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_run(folder / "texts")
    return config, short_training.train_short(config, str(folder)), folder


def test_a_short_training_says_what_it_needs_and_learns(trained):
    measured = trained[1].measured
    assert measured["memory_mb"] > 0
    assert measured["tokens_per_s"] > 0
    assert 0 < measured["loss"] < 10


def test_evaluation_of_what_was_trained(trained):
    config, result, _ = trained
    rows = scaling_parts.evaluations(config, result)
    assert rows[0]["loss"] == pytest.approx(result.measured["loss"], rel=1e-6)
    assert len({row["loss"] for row in rows}) == len(rows)  # what is read makes a difference
    for row in rows:
        assert row["loss_difference"] == row["loss"] - result.measured["loss"]


def test_a_kept_prefix_stands_where_reading_it_ends(trained, monkeypatch):
    monkeypatch.setattr(scaling_parts, "PREFIX", 9)
    config, result, folder = trained
    read, kept = scaling_parts.cached_prefix(config, result, str(folder))
    assert kept["loss_difference"] == 0
    assert "9 tokens" in read["changes"]
    assert min(read["tokens_per_s"], kept["tokens_per_s"]) > 0


def test_truncation_is_biased_unless_the_window_covers_the_row(trained):
    config, result, _ = trained
    cut, whole = scaling_parts.truncation_bias(copy.deepcopy(config), result, (2, LENGTH))
    assert 1e-3 < cut["relative_difference"] < 1
    assert 0 < cut["cosine"] < 1
    assert whole["relative_difference"] < 1e-5
    assert whole["cosine"] == pytest.approx(1)
    scaling_parts.show_bias([cut, whole])


def test_a_step_without_compilation(monkeypatch):
    monkeypatch.setattr(scaling_parts, "EAGER_TOKENS", 2)
    config = small_config()
    assert scaling_parts.eager_step(config)["tokens_per_s"] > 0
    assert config.data.sequence_length == 7


def test_a_narrow_state_loses_more_the_further_one_reads():
    rows = scaling_parts.state_errors(256)
    assert [row["position"] for row in rows] == [16, 64, 256]
    assert max(row["float32"] for row in rows) < 1e-5
    by_token = [row["bfloat16_by_token"] for row in rows]
    assert sorted(by_token) == by_token
    # The first rounding by chunks is after 64 tokens.
    assert rows[1]["bfloat16_by_chunk"] < 1e-5 < 1e-4 < rows[2]["bfloat16_by_chunk"]
    scaling_parts.show_errors(rows)


def test_memory_against_length(monkeypatch, tmp_path):
    def load(name, batch, length):
        return small_config(batch_size=batch, sequence_length=length)

    ways = {"whole": {}, "time": {"sequence": 2}}
    monkeypatch.setattr(scaling_memory, "load_config", load)
    monkeypatch.setattr(scaling_memory, "call_isolated", in_this_process)
    monkeypatch.setattr(scaling_memory, "LENGTHS", (256,))
    monkeypatch.setattr(scaling_memory, "WAYS", ways)
    rows = scaling_memory.measure()
    json.dumps(rows)
    assert rows[0]["length"] == 256
    assert rows[0]["time"] < rows[0]["whole"]
    scaling_memory.show(rows)
    path = scaling_memory.draw(rows, str(tmp_path))
    assert Path(path).read_bytes().startswith(b"\x89PNG")


def test_another_draw_is_another_run_on_the_same_texts(trained):
    config, result, folder = trained
    other = short_training.train_short(config, str(folder), draw=1)
    assert other.corpus.content_hash == result.corpus.content_hash
    assert config.train.seed == 0
    assert any(
        (one != two).any()
        for one, two in zip(
            jax.tree.leaves(result.params), jax.tree.leaves(other.params), strict=True
        )
    )
