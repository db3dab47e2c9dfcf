"""``benchmark.py growth`` and ``sizes`` at tiny sizes: results and arithmetic, never a time."""

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
    ((_, rows),) = sizes.run(Effort(1, 1))
    data, fsdp, tensor = json.loads(json.dumps(rows))
    assert data["parameters"] == count_parameters(config)
    # Gradients, with a few sums of single numbers.
    assert data["all-reduce"] * 1e6 == pytest.approx(4 * data["parameters"], abs=50)
    assert data["all-gather"] == data["reduce-scatter"] == 0 < fsdp["reduce-scatter"]
    assert fsdp["state and batch"] < data["state and batch"] / 4
    assert tensor["all-reduce"] > fsdp["all-reduce"]


def test_growths_have_rows_slopes_and_pictures(monkeypatch, tmp_path):
    def load(name, batch, length, **fields):
        return small_config(batch_size=batch, sequence_length=length, **fields)

    tokenizers = []

    def prepare(config, *rest):
        tokenizers.append(config.tokenizer)
        return prepare_corpus(config, *rest)

    monkeypatch.setattr(growth, "load_config", load)
    monkeypatch.setattr(growth, "prepare_corpus", prepare)
    monkeypatch.setattr(growth, "call_isolated", lambda call, **given: call(**given))
    monkeypatch.setattr(growth, "on_simulated_devices", lambda _, call, **given: call(**given))
    smaller = {"SIZES": ((8, 1, 2, 11), (16, 1, 4, 23)), "LENGTHS": (8, 16), "LONGEST_PLAIN": 8}
    smaller |= {"BATCHES": (1, 2), "DEVICES": (1, 2), "SMALLEST_CORPUS": 1, "_FILE_BYTES": 10_000}
    smaller["TOKENIZERS"] = {"bytes": ("byte", 100), "BPE": ("bpe:300", 1)}
    for name, value in smaller.items():
        monkeypatch.setattr(growth, name, value)
    *measured, (title, slopes) = growth.run(Effort(1, 1), largest_corpus=10)
    assert [title for title, _ in measured] == list(growth.TITLES)
    assert title not in growth.TITLES
    for title, rows in json.loads(json.dumps(measured)):
        assert len(rows) == 2
        assert growth.draw(title, rows).startswith(b"\x89PNG")
    parameters, lengths, batches, corpora, devices = (rows for _, rows in measured)
    assert parameters[0]["memory (MB)"] < parameters[1]["memory (MB)"]
    assert lengths[1]["memory (MB), whole sequence"] is None
    assert batches[0]["memory (MB)"] < batches[1]["memory (MB)"]
    assert [row["MB of text"] for row in corpora] == [1, 10]
    assert [row["time (ms), BPE"] is None for row in corpora] == [False, True]
    assert tokenizers == ["byte", "bpe:300", "byte"]
    assert [row["exchanged (MB), data"] is None for row in devices] == [True, False]
    assert {row["growth with"] for row in slopes} == set(growth.PICTURES)


def test_the_slope_of_a_power_is_its_exponent():
    curve = {str(n): 3.0 * n**1.5 for n in (1, 2, 8, 64)}
    assert growth.slope(curve) == pytest.approx(1.5)
    ends = {"1": 1.0, "2": 2.0, "4": 8.0}
    (row,) = growth.slopes("x", {"seconds": {"all": ends}})
    assert row["at the end"] == pytest.approx(2)
    assert row["slope"] == pytest.approx(1.5)
