"""``benchmark.py sizes`` and ``memory`` at tiny sizes: results, never a time."""

import json

import pytest
from small_runs import small_config

from benchmarks import sizes
from benchmarks.train_steps import count_parameters

pytestmark = pytest.mark.oldest_python


def test_a_step_on_a_mesh_is_measured_by_kind(monkeypatch):
    fields = {"vocab_size": 264, "mlp_dim": 8, "num_heads": 4, "batch_size": 8, "data": 1}
    config = small_config("residual", **fields)
    monkeypatch.setattr(sizes.config_files, "load_config", lambda _: config)
    monkeypatch.setattr(sizes, "NAMES", ("tiny",))
    monkeypatch.setattr(sizes, "on_simulated_devices", lambda _, call, **given: call(**given))
    (table,) = sizes.run()
    data, fsdp, tensor = json.loads(json.dumps(table.rows))
    assert data["parameters"] == count_parameters(config)
    # Gradients, with a few sums of single numbers.
    assert data["all-reduce"] * 1e6 == pytest.approx(4 * data["parameters"], abs=50)
    assert data["all-gather"] == data["reduce-scatter"] == 0 < fsdp["reduce-scatter"]
    assert fsdp["state and batch"] < data["state and batch"] / 4
    assert tensor["all-reduce"] > fsdp["all-reduce"]


def load_small(name, batch, length, **fields):
    return small_config(batch_size=batch, sequence_length=length, **fields)


def test_memory_against_length(monkeypatch):
    monkeypatch.setattr(sizes, "load_config", load_small)
    monkeypatch.setattr(sizes, "on_simulated_devices", lambda _, call, **given: call(**given))
    techniques = {"plain": {}, sizes.SCAN: {}, "sharded": {"sequence": 2}}
    monkeypatch.setattr(sizes, "TECHNIQUES", techniques)
    monkeypatch.setattr(sizes, "LENGTHS", (256,))
    (table,) = sizes.run_memory()
    ((_, curves),) = table.panels.items()
    plain, scan, sharded = (curves[name]["256"] for name in techniques)
    assert sharded < plain != scan
