"""``benchmark.py scaling``, ``sizes`` and ``memory`` at tiny sizes: results, never a time."""

import json

import jax
import pytest
from small_runs import small_config, write_corpus

from benchmarks import scaling, train_steps
from benchmarks.measure import Effort
from benchmarks.train_steps import count_parameters
from simplernn_jax.config import validate

pytestmark = pytest.mark.oldest_python


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    config = small_config(
        **{"batch_size": 8, "sequence_length": 8, "steps": 3, "eval_tokens": 300},
        **{"source": write_corpus(folder / "texts", documents=30), "validation_fraction": 0.3},
    )
    return config, train_steps.train_on_corpus(config, str(folder)), folder


def test_every_technique_is_valid_and_trains_on_as_many_tokens():
    for _, _, given in scaling.TECHNIQUES:
        fields = {name: given[name] for name in given.keys() - {"seed"}}
        config = train_steps.change(scaling.small_run(), **fields)
        validate(config)
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


def test_a_cached_prefix_is_continued(trained, monkeypatch):
    _, result, folder = trained
    monkeypatch.setattr(scaling, "PREFIX", 9)
    prefilled, cached = scaling.cached_prefix(result, str(folder), Effort(1, 1))
    assert "9 tokens prefilled" in prefilled["change"]
    assert "loaded" in cached["change"]


def test_a_step_on_a_mesh_is_measured_by_kind(monkeypatch):
    fields = {"vocab_size": 264, "mlp_dim": 8, "num_heads": 4, "batch_size": 8, "data": 1}
    config = small_config("residual", **fields)
    monkeypatch.setattr(scaling.config_files, "load_config", lambda _: config)
    monkeypatch.setattr(scaling, "NAMES", ("tiny",))
    monkeypatch.setattr(scaling, "on_simulated_devices", lambda _, call, **given: call(**given))
    (table,) = scaling.run_sizes()
    data, fsdp, tensor = json.loads(json.dumps(table.rows))
    assert data["parameters"] == count_parameters(config)
    # Gradients, with a few sums of single numbers.
    assert data["all-reduce"] * 1e6 == pytest.approx(4 * data["parameters"], abs=50)
    assert data["all-gather"] == data["reduce-scatter"] == 0 < fsdp["reduce-scatter"]
    assert fsdp["state and batch"] < data["state and batch"] / 4
    assert tensor["all-reduce"] > fsdp["all-reduce"]
