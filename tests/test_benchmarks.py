"""What ``scripts/benchmark.py`` computes, at tiny sizes: results and arithmetic, never a time."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import decoding, jax_steps, machine, memory, recurrence, tables, training
from benchmarks.interleave import Effort, alternate, block_ratio, median
from benchmarks.isolated import call_isolated
from benchmarks.peak_memory import process_peak
from simplernn_jax.config import Config, ModelConfig
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.pytorch_weights import load_pytorch_weights

ROOT = Path(__file__).resolve().parents[1]
EFFORT = Effort(blocks=2, calls=1)


def small_config(name: str) -> Config:
    heads = 1 if name == "seed" else 2
    sizes = {"vocab_size": 23, "num_layers": 1, "num_heads": heads, "mlp_dim": 11}
    widths = dict.fromkeys(("hidden_dim", "key_dim", "value_dim"), 6)
    return jax_steps.load_config(name, 2, 7, **sizes, **widths)


def test_candidates_take_turns_and_the_first_call_of_a_block_is_dropped():
    calls = []
    times = alternate({name: lambda name=name: calls.append(name) for name in "ab"}, Effort(2, 3))
    assert "".join(calls) == "ab" + 2 * "aaaabbbb"
    assert [len(block) for block in times["a"]] == [3, 3]


def test_ratio_is_the_median_over_blocks_of_the_ratio_of_medians():
    assert median([[1.0, 2.0], [3.0]]) == 2
    slower, faster = [[4.0, 100.0, 2.0], [9.0], [10.0]], [[2.0], [3.0], [1.0]]
    assert block_ratio(slower, faster) == 3


def test_numbers_in_tables():
    assert tables.number(1234.56, 1) == "1,234.6"
    assert [tables.times(31.24), tables.times(1.5), tables.share(0.456)] == [
        "31.2x",
        "1.50x",
        "45.6%",
    ]
    assert {tables.number(None), tables.times(None), tables.share(None)} == {"-"}


def test_a_function_in_a_process_of_its_own_answers_and_its_failure_is_told():
    name, variable = "BENCHMARK_TEST", "a value"
    assert call_isolated(os.getenv, {name: variable}, key=name) == variable
    with pytest.raises(RuntimeError, match="no_such_field"):
        call_isolated(memory.take_step, config='{"no_such_field": 1}')


def test_machine_and_its_ceilings():
    described = machine.describe()
    assert described["jax"]
    assert described["cores"] >= 1
    json.dumps(described)
    assert machine.batched_product(3, 5, 7, 11, "bfloat16").amount == 2 * 3 * 5 * 7 * 11
    product = machine.square_product("bfloat16", 5)
    assert product.call().dtype == jnp.float32
    assert machine.memory_copy(64).call().nbytes == 64
    ceilings = machine.measure_ceilings(EFFORT, size=8, num_bytes=64)
    assert all(rate > 0 for rate in ceilings.values())
    assert machine.say_ceilings(ceilings).startswith("ceilings: square float32")


def test_necessary_products_are_those_of_the_docstring():
    batch, length, heads, key, value, chunk = 2, 24, 3, 5, 7, 8
    shape = recurrence.Shape(batch, length, heads, key, value)
    forward_and_backward = 2 + 4
    by_token = forward_and_backward * key * value
    assert recurrence.recurrence_flops(shape) == 2 * batch * length * heads * by_token

    causal = chunk * chunk / 2
    inside = causal * (key + value)  # A, A V
    inside += causal * (value + value + key + key)  # dA, A^T dO, dA K, dA^T Q
    by_chunk = inside + chunk * by_token
    chunks = batch * heads * length / chunk
    assert recurrence.chunk_flops(shape, chunk) == 2 * chunks * by_chunk


def test_summary_of_the_recurrence_takes_rates_from_times():
    shape = recurrence.Shape(1, 1000, 1, 10, 10)
    times = {"chunkwise": [[0.5], [0.5]], "scan": [[5.0], [2.0]], "ceiling": [[0.25], [0.25]]}
    summary = recurrence.summarize_times(shape, times, ceiling_flops=2e6)
    assert summary["times_faster"] == 7
    assert summary["recurrence_gflops"] == pytest.approx(1.2e6 / 0.5 / 1e9)
    assert summary["recurrence_share"] == pytest.approx((1.2e6 / 0.5) / (2e6 / 0.25))
    assert summary["chunks_share"] > summary["recurrence_share"]


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 3e-5), ("bfloat16", 1e-2)])
def test_comparison_of_the_recurrence(dtype, limit):
    row = recurrence.compare(recurrence.Shape(2, 19, 3, 5, 7), dtype, EFFORT)
    json.dumps(row)
    for method in ("chunkwise", "scan"):
        assert row[f"{method}_errors"].keys() == set(recurrence.RESULTS)
        assert 0 < max(row[f"{method}_errors"].values()) < limit
        assert row[f"{method}_mb"] > 0


def test_comparison_of_lengths_keeps_the_number_of_tokens():
    widths = recurrence.Shape(0, 0, 2, 5, 7)
    result = recurrence.compare_lengths((8, 16, 32), 32, widths, "float32", EFFORT)
    assert list(result["us_per_token"]) == ["8", "16", "32"]
    assert result["relative"]["8"] == 1


def test_by_scan_the_step_is_the_same_and_is_another_program():
    ours, by_scan = (
        jax_steps.our_step(small_config("base")),
        jax_steps.scan_step(small_config("base")),
    )
    np.testing.assert_allclose(
        [float(ours().loss) for _ in range(3)], [float(by_scan().loss) for _ in range(3)], rtol=1e-5
    )
    assert ours.program.as_text() != by_scan.program.as_text()
    assert ours.compiled_bytes > ours.temporary_bytes > 0


def test_a_stack_of_grus_learns_the_batch():
    step = jax_steps.gru_step(small_config("seed"))
    first, *_, last = [float(step()) for _ in range(20)]
    assert last < first


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="PyTorch is not installed")


def test_the_pytorch_loop_is_our_plain_model(torch, tmp_path):
    from benchmarks.torch_loop import LoopModel, torch_step

    torch.manual_seed(0)
    model = LoopModel(23, 2, 6, 5, 7)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    tokens = np.random.default_rng(0).integers(0, 23, (2, 13), np.int32)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens).long()).numpy()
    logits, _ = load_pytorch_weights(str(tmp_path / "model.pt"))(jnp.asarray(tokens))
    np.testing.assert_allclose(logits, expected, atol=1e-5)

    step = torch_step(small_config("seed"), tokens, tokens)
    first, *_, last = [step() for _ in range(20)]
    assert last < first


def test_programs_that_train_the_same_model(torch, monkeypatch):
    monkeypatch.setattr(training, "call_isolated", lambda function, **given: function(**given))
    rows = training.compare_programs(small_config("seed"), EFFORT)
    assert list(rows) == ["ours", "scan", "GRU", "PyTorch loop"]
    assert rows["ours"]["times_slower"] == 1
    assert all(row["tokens_per_s"] > 0 for row in rows.values())
    assert rows["PyTorch loop"]["compiled_mb"] is None
    training._show_programs(rows)


def test_without_torch_its_row_says_so(monkeypatch, capsys):
    monkeypatch.setattr(training, "JAX_STEPS", {"ours": jax_steps.our_step})
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(training, "call_isolated", lambda *_, **__: None)
    rows = training.compare_programs(small_config("seed"), EFFORT)
    assert rows["PyTorch loop"] == {}
    training._show_programs(rows)
    assert "torch is not installed (pip install -e '.[bench]')" in capsys.readouterr().out


def test_precisions_count_six_operations_per_parameter_and_token():
    results = training.compare_precisions(small_config("base"), EFFORT, size=8)
    model = LanguageModel(small_config("base").model, rngs=nnx.Rngs(0))
    parameters = sum(x.size for x in nnx.to_flat_state(nnx.state(model, nnx.Param)).leaves)
    assert results["parameters"] == parameters
    assert results["float32"]["times_faster_than_float32"] == 1
    blocks = [[0.5], [0.5]]
    times = {"float32": blocks, "product": [[0.25], [0.25]]}
    row = training.summarize_precision(100, 10, blocks, times, product_flops=6000.0)
    assert row["share_of_product"] == pytest.approx(0.5)
    assert row["tokens_per_s"] == 20


def test_decoding_compares_every_way_to_come_by_a_token():
    config = ModelConfig(
        vocab_size=23, num_layers=1, hidden_dim=6, key_dim=6, value_dim=6, num_heads=2, mlp_dim=11
    )
    results = decoding.compare(
        config, EFFORT, contexts=(1, 2, 9), prefill=8, streams=2, new_tokens=5
    )
    assert results["us_per_token"].keys() == {
        *("short", "middle", "long", "recompute", "products", "streams", "prefill", "streaming")
    }
    assert all(ratio > 0 for ratio in results["ratios"].values())
    decoding._show(results)


def test_what_is_recomputed_is_what_writing_goes_on_with():
    model = LanguageModel(small_config("base").model, rngs=nnx.Rngs(0))
    prompt = decoding.prompts(model.config, 1, 9)
    written = decoding.generate(model, prompt, max_new_tokens=1).tokens
    assert written[0] == decoding.recompute(model, prompt)()


def test_every_matrix_is_in_the_products():
    """Kernels and the embedding; the weights of the short convolution are in no matrix product."""
    config = small_config("base").model
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    before = decoding.matrix_vector_products(model, 3)()
    leaves = nnx.to_flat_state(nnx.state(model, nnx.Param))
    names = ("kernel", "embedding")
    matrices = [leaf for path, leaf in leaves if path[-1] in names]
    assert len(matrices) == 1 + config.num_layers * 8
    for matrix in matrices:
        value = matrix[...]
        matrix.set_value(value[:, ::-1])
        assert not np.allclose(decoding.matrix_vector_products(model, 3)(), before)
        matrix.set_value(value)


def test_memory_of_a_step_by_both_accounts():
    row = memory.compare(small_config("base"))
    assert row["length"] == 7
    assert row["temporary_bytes"] > 0
    assert row["scan_temporary_bytes"] > 0
    assert row["seconds"] > 0
    memory._show([row])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_of_a_process_counts_what_was_freed_again():
    def work() -> None:
        np.ones(2**24)  # 128 MiB

    peak = process_peak(work)
    assert 100 * 2**20 < peak.over_start < 200 * 2**20
    assert peak.total > peak.over_start


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name what to measure: python scripts/benchmark.py ops|train|decode|startup|memory"),
        (["opps"], "'opps': no such benchmark; did you mean 'ops'?"),
        (["ops", "--out", "no/such/folder/x.json"], "--out=no/such/folder/x.json: no folder"),
        (["ops", "--blocks=1"], "blocks"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message):
    result = run_benchmark(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
