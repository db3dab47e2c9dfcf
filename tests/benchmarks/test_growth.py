"""``benchmark.py growth``, ``sizes`` and ``memory`` at tiny sizes: results, never a time."""

import importlib
import json

import pytest
from meshes import mesh_of
from small_runs import small_config

from benchmarks import growth, sizes
from benchmarks.measure import Effort
from benchmarks.train_steps import count_parameters
from simplernn_jax.config import validate
from simplernn_jax.data.token_store import prepare_corpus
from simplernn_jax.parallel.mesh import check_fits

pytestmark = pytest.mark.oldest_python


@pytest.mark.parametrize(("name", "parameters"), [("small", 24.7), ("gpt2_size", 123.6)])
def test_named_sizes_fit_all_meshes(name, parameters):
    config = importlib.import_module(f"configs.{name}").get_config()
    validate(config)
    assert count_parameters(config) / 1e6 == pytest.approx(parameters, abs=0.05)
    for mesh in sizes.MESHES:
        check_fits(config, mesh_of(**mesh))


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


def test_growths_have_curves_and_slopes(monkeypatch):
    tokenizers = []

    def prepare(config, *rest):
        tokenizers.append(config.tokenizer)
        return prepare_corpus(config, *rest)

    monkeypatch.setattr(growth, "load_config", load_small)
    monkeypatch.setattr(growth, "prepare_corpus", prepare)
    monkeypatch.setattr(growth, "call_isolated", lambda call, **given: call(**given))
    monkeypatch.setattr(growth, "on_simulated_devices", lambda _, call, **given: call(**given))
    smaller = {"SIZES": ((8, 1, 2, 11), (16, 1, 4, 23)), "LENGTHS": (8, 16), "LONGEST_PLAIN": 8}
    smaller |= {"BATCHES": (1, 2), "DEVICES": (1, 2), "SMALLEST_CORPUS": 1, "_FILE_BYTES": 10_000}
    smaller["TOKENIZERS"] = {"bytes": ("byte", 100), "BPE": ("bpe:300", 1)}
    for name, value in smaller.items():
        monkeypatch.setattr(growth, name, value)
    *tables, slopes = growth.run(Effort(1, 1), largest_corpus=10)
    assert len({table.picture for table in tables}) == len(tables)
    parameters, lengths, batches, corpora, devices = (
        {y.split(",")[0]: each for y, each in table.panels.items()} for table in tables
    )
    for smaller, larger in (
        parameters["memory (MB)"][growth.PLAIN].values(),
        batches["memory (MB)"][growth.PLAIN].values(),
    ):
        assert smaller < larger
    assert [len(curve) for curve in lengths["memory (MB)"].values()] == [1, 2]
    assert [list(curve) for curve in corpora["time (ms)"].values()] == [["1", "10"], ["1"]]
    assert sorted(tokenizers) == ["bpe:300", "byte", "byte"]
    assert list(devices["exchanged (MB)"]["data"]) == ["2"]
    assert {row["growth with"] for row in slopes.rows} == {table.x for table in tables}


def test_the_slope_of_a_power_is_its_exponent():
    curve = {str(n): 3.0 * n**1.5 for n in (1, 2, 8, 64)}
    assert growth.slope(curve) == pytest.approx(1.5)
