"""``benchmark.py scaling`` at tiny sizes: results, never a time."""

import copy

import jax
import pytest
from small_runs import small_config, write_corpus

from benchmarks import scaling, train_steps
from benchmarks.measure import Effort
from simplernn_jax import config as config_lib

pytestmark = pytest.mark.oldest_python

BATCH, LENGTH = 8, 8
EFFORT = Effort(1, 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    config = small_config(
        **{"batch_size": BATCH, "sequence_length": LENGTH, "steps": 3, "eval_tokens": 300},
        **{"source": write_corpus(folder / "texts", documents=30), "validation_fraction": 0.3},
    )
    return config, train_steps.train_on_corpus(config, str(folder)), folder


def test_every_technique_is_valid_and_trains_on_as_many_tokens():
    for _, _, given in scaling.TECHNIQUES:
        fields = {name: given[name] for name in given.keys() - {"seed", "recurrence"}}
        config = train_steps.change(scaling.small_run(), **fields)
        config_lib.validate(config)
        tokens = config.data.batch_size * config.data.sequence_length
        assert tokens == scaling.BATCH * scaling.LENGTH


def test_a_training_is_measured_and_another_seed_is_another_run_on_the_same_text(trained):
    config, result, folder = trained
    assert set(result.measured) == {"memory MB", "tokens/s", "nats/token", "bits/byte"}
    assert min(result.measured.values()) > 0
    other = train_steps.train_on_corpus(config, str(folder), seed=1)
    assert other.corpus.content_hash == result.corpus.content_hash
    assert config.train.seed == 0
    pairs = zip(jax.tree.leaves(result.params), jax.tree.leaves(other.params), strict=True)
    assert any((one != two).any() for one, two in pairs)


def test_evaluations_a_cached_prefix_and_a_step_without_compilation(trained, monkeypatch):
    config, result, folder = trained
    rows = scaling.evaluations(config, result, EFFORT)
    assert rows[0]["nats/token"] == pytest.approx(result.measured["nats/token"], rel=1e-6)
    assert len({row["nats/token"] for row in rows}) == len(rows)  # windows make a difference
    monkeypatch.setattr(scaling, "PREFIX", 9)
    prefilled, cached = scaling.cached_prefix(result, str(folder), EFFORT)
    assert "9 tokens" in prefilled["change"]
    assert "loaded" in cached["change"]
    monkeypatch.setattr(scaling, "EAGER_TOKENS", 2)
    eager = scaling.eager_step(copy.deepcopy(config))
    assert eager["tokens/s"] > 0


def test_truncation_is_biased_unless_the_window_covers_the_sequence(trained):
    config, result, _ = trained
    cut, whole = scaling.truncation_bias(copy.deepcopy(config), result, (2, LENGTH))
    assert 1e-3 < cut["difference / whole"] < 1
    assert 0 < cut["cosine"] < 1
    assert whole["difference / whole"] < 1e-5
    assert whole["cosine"] == pytest.approx(1)


def test_a_bfloat16_state_loses_more_with_the_position():
    rows = scaling.state_errors(256)
    assert [row["position"] for row in rows] == ["up to 16", "up to 64", "up to 256"]
    assert max(row["float32"] for row in rows) < 1e-5
    by_token = [row["bfloat16, each token"] for row in rows]
    assert sorted(by_token) == by_token
    # The first rounding by chunks is after 64 tokens.
    by_chunk = [row["bfloat16, each 64 tokens"] for row in rows]
    assert by_chunk[1] < 1e-5 < 1e-4 < by_chunk[2]
