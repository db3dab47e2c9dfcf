"""Benchmarks of ``scripts/benchmark.py`` at tiny sizes: results and arithmetic, never a time."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from processes import ROOT, assert_each_refused

from benchmarks import decoding, measure, recurrence, tables, train_steps, training
from benchmarks.measure import Effort
from simplernn_jax.config import DataConfig
from simplernn_jax.data import open_corpus
from simplernn_jax.errors import UserError
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.pytorch_weights import load_pytorch_weights
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.train_step import init_train_state, make_train_step

pytestmark = pytest.mark.oldest_python

EFFORT = Effort(blocks=2, calls=1)


def small_config(name):
    heads = 1 if name == "pytorch_reference" else 2
    sizes = {"vocab_size": 23, "num_layers": 1, "num_heads": heads, "mlp_dim": 11}
    widths = dict.fromkeys(("hidden_dim", "key_dim", "value_dim"), 6)
    return train_steps.load_config(name, 2, 7, **sizes, **widths)


def fixed_times(module, monkeypatch, **seconds):
    """The module's candidates run once each; their times are `seconds` by name, or else 1."""

    def alternate(candidates, effort):
        for call in candidates.values():
            jax.block_until_ready(call())
        return {name: [[seconds.get(name, 1.0)]] * effort.blocks for name in candidates}

    monkeypatch.setattr(module, "alternate", alternate)


def test_candidates_alternate_and_the_first_call_of_a_block_is_dropped():
    calls = []
    candidates = {name: functools.partial(calls.append, name) for name in "ab"}
    times = measure.alternate(candidates, Effort(2, 3))
    assert "".join(calls) == "ab" + 2 * "aaaabbbb"
    assert [len(block) for block in times["a"]] == [3, 3]
    assert measure.median([[1.0, 2.0], [3.0]]) == 2
    slower, faster = [[4.0, 100.0, 2.0], [9.0], [10.0]], [[2.0], [3.0], [1.0]]
    assert measure.block_ratio(slower, faster) == 3


def test_tables_are_markdown():
    cells = [1234.56, 31.24, 1.5, 0.456, 3.2e-7, 0.0, None, "x", 12345]
    texts = ["1,235", "31.2", "1.500", "0.4560", "3.2e-07", "0.0000", "-", "x", "12,345"]
    assert [tables.text_of(cell) for cell in cells] == texts
    rows = [{"a": 1, "long": 2}, {"b": 3}]
    table = "| a | long | b |\n| - | ---- | - |\n| 1 | 2    |   |\n|   |      | 3 |\n"
    assert tables.markdown(rows) == table


def test_a_function_in_a_fresh_process_answers_or_its_failure_is_reported(capfd):
    name, variable = "BENCHMARK_TEST", "a value"
    assert measure.call_isolated(os.getenv, {name: variable}, key=name) == variable
    with pytest.raises(subprocess.CalledProcessError):
        measure.call_isolated(os.stat, path="no_such_file")
    assert "no_such_file" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"^nowhere: "):
        measure.call_isolated(open_corpus, config=DataConfig(source="nowhere"))


def test_a_function_in_a_fresh_process_has_the_callers_folder(tmp_path, monkeypatch):
    (tmp_path / "random.py").write_text("raise ImportError")  # nothing is imported from there
    monkeypatch.chdir(tmp_path)
    assert measure.call_isolated(os.getcwd) == str(tmp_path)


def test_the_machine_and_its_ceiling():
    assert json.loads(json.dumps(measure.describe_machine()))["jax"]
    call, flops = measure.matmul((3, 5, 7), (3, 7, 11), "bfloat16")
    assert (call().dtype, flops) == (jnp.float32, 2 * 3 * 5 * 7 * 11)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_of_a_process_counts_freed_memory():
    peak = measure.process_peak(lambda: np.ones(2**24))  # 128 MiB
    assert 100 * 2**20 < peak < 200 * 2**20


@pytest.mark.parametrize("dtype", recurrence.DTYPES)
def test_ops_tables(dtype, monkeypatch):
    seconds = {"ours": 0.5, "scan": 3.0, "ceiling": 0.25, "T 8": 2.0, "T 16": 3.0}
    fixed_times(recurrence, monkeypatch, **seconds)
    shape = recurrence.Shape(2, 19, 3, 5, 7)
    row = recurrence.compare_lengths((8, 16), shape, dtype, EFFORT)
    assert (row["T 8"], row["T 16"], row["T 16 / T 8"]) == (2e6 / 16, 3e6 / 16, 1.5)
    row = recurrence.compare(shape, dtype, EFFORT)
    json.dumps(row)
    assert [row[f"{name} ms"] for name in ("ours", "chunks", "scan")] == [500, 1000, 3000]
    assert row["scan / ours"] == 6
    multiply_adds = 2 * 19 * 3 * (2 + 4) * 5 * 7
    assert row["GFLOP/s"] == pytest.approx(2 * multiply_adds / 0.5 / 1e9)
    assert row["share"] == pytest.approx(row["GFLOP/s"] / row["ceiling GFLOP/s"])
    assert min(row[f"{name} MB"] for name in ("ours", "chunks", "scan")) > 0


def test_other_programs_learn_the_batch():
    *ours, gru = (
        training.make_step(name, small_config("pytorch_reference"))
        for name in training.PROGRAMS[:3]
    )
    np.testing.assert_allclose(
        *[[float(step().loss) for _ in range(3)] for step in ours], rtol=1e-5
    )
    first, *_, last = [float(gru()) for _ in range(20)]
    assert last < first


def test_the_pytorch_loop_trains_our_plain_model(tmp_path):
    """From the same weights and on the same batch its losses are ours."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from benchmarks.torch_loop import LoopModel, torch_step

    config = small_config("pytorch_reference")
    torch.manual_seed(0)  # as `torch_step` does
    torch.save(LoopModel(23, 1, 6, 6, 6).state_dict(), tmp_path / "model.pt")
    params = nnx.state(load_pytorch_weights(str(tmp_path / "model.pt")), nnx.Param)
    optimizer = make_optimizer(config.optimizer, 1000)
    start = dataclasses.replace(init_train_state(config, optimizer), params=params)
    step, batch = make_train_step(config, optimizer), train_steps.random_batch(config)
    ours, loop = train_steps.compiled_step(step, lambda: start, batch), torch_step(config)
    losses = [float(ours().loss) for _ in range(5)]
    np.testing.assert_allclose([loop() for _ in range(5)], losses, rtol=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("has_torch", [True, False])
def test_table_of_programs(has_torch, monkeypatch):
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda _: has_torch or None)
    monkeypatch.setattr(training, "make_step", lambda *_: int)
    monkeypatch.setattr(measure, "call_isolated", lambda *_, **__: 1e6)
    fixed_times(training, monkeypatch, ours=0.5, **{"PyTorch loop": 2.0})
    first, *_, last = training.compare_programs(small_config("pytorch_reference"), EFFORT)
    assert (first["program"], first["tokens/s"]) == ("ours", 2 * 7 / 0.5)
    if has_torch:
        assert last["times slower than ours"] == 4
    else:
        assert "torch is not installed (pip install -e '.[bench]')" in last["program"]


def test_table_of_precisions_counts_six_operations_per_parameter_and_token(monkeypatch):
    made = []

    def our_step(config):
        made.append(config.model.precision)
        return int

    monkeypatch.setattr(training, "our_step", our_step)
    fixed_times(training, monkeypatch, float32=0.5, bfloat16=0.125, matmul=0.25)
    config = small_config("base")
    float32, bfloat16 = training.compare_precisions(config, EFFORT, size=8)
    assert made == ["float32", "bfloat16"]
    model = LanguageModel(config.model, rngs=nnx.Rngs(0))
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    flops = 6 * parameters * 2 * 7
    assert (float32["ms/step"], bfloat16["over float32"]) == (500, 4)
    assert bfloat16["tokens/s"] == 2 * 7 / 0.125
    assert bfloat16["GFLOP/s"] == pytest.approx(flops / 0.125 / 1e9)
    assert bfloat16["share"] == pytest.approx((flops / 0.125) / (2 * 8**3 / 0.25))


def test_decode_table(monkeypatch):
    fixed_times(decoding, monkeypatch, long=2.0, matmuls=0.5, prefill=0.25, streaming=3.0)
    contexts = {"short": 1, "middle": 2, "long": 9}
    sizes = {"PREFILL": 8, "STREAMS": 2, "NEW_TOKENS": 5, "CONTEXTS": contexts}
    for name, value in sizes.items():
        monkeypatch.setattr(decoding, name, value)
    candidates, ratios = decoding.compare(small_config("base").model, EFFORT)
    per_second = {
        "recompute": 1,
        "loop": 5,
        "streams": 2 * 5,
        "prefill": 8 / 0.25,
        "matmuls": 5 / 0.5,
    }
    per_second |= {"short": 5, "middle": 5, "long": 5 / 2, "streaming": 5 / 3}
    found = {row["candidate"]: row["tokens/s"] for row in candidates}
    assert found == pytest.approx(per_second)
    assert [row["value"] for row in ratios] == pytest.approx([2, 5, 2, 1, 2, 6.4, 3])


def test_the_recomputed_token_and_every_matrix_in_the_products():
    """Kernels and the embedding; the weights of the short convolution are in no matmul."""
    config = small_config("base").model
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    prompt = decoding.random_tokens(config, 1, 9)
    generated = decoding.generate(model, prompt, max_new_tokens=1).tokens
    assert generated[0] == decoding.recompute_call(model, prompt)()

    before = decoding.matrix_vector_products(model, 3)()
    leaves = nnx.to_flat_state(nnx.state(model, nnx.Param))
    matrices = [leaf for path, leaf in leaves if path[-1] in ("kernel", "embedding")]
    assert len(matrices) == 1 + config.num_layers * 8
    for matrix in matrices:
        value = matrix[...]
        matrix.set_value(value[:, ::-1])
        assert not np.allclose(decoding.matrix_vector_products(model, 3)(), before)
        matrix.set_value(value)


def test_plain_loops_leave_subnormal_numbers_as_they_are():
    """Code that GCC links for -ffast-math flushes them in every later computation of the thread."""
    decoding.products_in_c(LanguageModel(small_config("base").model, rngs=nnx.Rngs(0)), 1)()
    assert sys.float_info.min / 2 > 0


def test_bad_arguments_are_one_line():
    assert_each_refused(
        ROOT / "scripts" / "benchmark.py",
        ([], "name a benchmark: python scripts/benchmark.py ops|train|decode|startup|memory"),
        (["attention"], "attention: name its folder, --out"),
        (["attention", "--out=x", "--only=recal"], "'recal': no such measurement; did you mean"),
        (["attention", "--out=x", "--blocks=2"], "--blocks: not of attention"),
        (["ops", "attention", "--out=x"], "measure the others without it"),
        (["opps"], "'opps': no such benchmark; did you mean 'ops'?"),
        (["ops", f"--out={ROOT / 'README.md'}"], "README.md: file exists"),
        (["ops", "--blocks=0"], "blocks"),
        imports="benchmarks.scaling",
    )
