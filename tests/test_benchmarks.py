"""What ``scripts/benchmark.py`` computes, at tiny sizes: results and arithmetic, never a time."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
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
from simplernn_jax.training.optimizer import make_optimizer
from simplernn_jax.training.train_step import init_train_state, make_train_step

ROOT = Path(__file__).resolve().parents[1]
EFFORT = Effort(blocks=2, calls=1)


def small_config(name: str) -> Config:
    heads = 1 if name == "seed" else 2
    sizes = {"vocab_size": 23, "num_layers": 1, "num_heads": heads, "mlp_dim": 11}
    widths = dict.fromkeys(("hidden_dim", "key_dim", "value_dim"), 6)
    return jax_steps.load_config(name, 2, 7, **sizes, **widths)


def fixed_times(module: Any, monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    """The module's candidates run once each; what they took is `seconds` by name, or else 1."""

    def alternate(candidates: dict[str, Any], effort: Effort) -> dict[str, list[list[float]]]:
        for call in candidates.values():
            jax.block_until_ready(call())
        return {name: [[seconds.get(name, 1.0)]] * effort.blocks for name in candidates}

    monkeypatch.setattr(module, "alternate", alternate)


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


def test_machine_and_its_ceilings(monkeypatch):
    described = machine.describe()
    assert described["jax"]
    assert described["cores"] >= 1
    json.dumps(described)
    assert machine.batched_product(3, 5, 7, 11, "bfloat16").amount == 2 * 3 * 5 * 7 * 11
    product = machine.square_product("bfloat16", 5)
    assert product.call().dtype == jnp.float32
    assert machine.memory_copy(64).call().nbytes == 64
    fixed_times(machine, monkeypatch, copy_gb_per_s=0.5)
    ceilings = machine.measure_ceilings(EFFORT, size=8, num_bytes=64)
    assert ceilings["square_bfloat16_gflops"] == pytest.approx(2 * 8**3 / 1e9)
    assert ceilings["copy_gb_per_s"] == pytest.approx(2 * 64 / 0.5 / 1e9)
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
    times = {
        "ours": [[0.5], [0.5]],
        "chunks": [[1.0], [1.0]],
        "scan": [[5.0], [2.0]],
        "ceiling": [[0.25], [0.25]],
    }
    summary = recurrence.summarize_times(shape, times, ceiling_flops=2e6)
    assert summary["times_faster"] == 7
    assert summary["recurrence_gflops"] == pytest.approx(1.2e6 / 0.5 / 1e9)
    assert summary["recurrence_share"] == pytest.approx((1.2e6 / 0.5) / (2e6 / 0.25))
    assert summary["chunks_share"] > summary["recurrence_share"]


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 3e-5), ("bfloat16", 1e-2)])
def test_comparison_of_the_recurrence(dtype, limit):
    row = recurrence.compare(recurrence.Shape(2, 19, 3, 5, 7), dtype, EFFORT)
    json.dumps(row)
    for method in ("ours", "chunks", "scan"):
        assert row[f"{method}_errors"].keys() == set(recurrence.RESULTS)
        assert 0 < max(row[f"{method}_errors"].values()) < limit
        assert row[f"{method}_mb"] > 0


def test_comparison_of_lengths_keeps_the_number_of_tokens(monkeypatch):
    fixed_times(recurrence, monkeypatch, **{"8": 2.0, "16": 3.0})
    widths = recurrence.Shape(0, 0, 2, 5, 7)
    result = recurrence.compare_lengths((8, 16), 16, widths, "float32", EFFORT)
    assert result["us_per_token"] == {"8": 2e6 / 16, "16": 3e6 / 16}
    assert result["relative"] == {"8": 1, "16": 1.5}


def test_by_scan_the_step_is_the_same_and_is_another_program():
    ours, by_scan = (
        make(small_config("seed")) for make in (jax_steps.our_step, jax_steps.scan_step)
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


def test_the_pytorch_loop_trains_our_plain_model(torch, tmp_path):
    """From the same weights and on the same batch its logits and its losses are ours."""
    from benchmarks.torch_loop import LoopModel, torch_step

    config = small_config("seed")
    batch = jax_steps.random_batch(config)
    torch.manual_seed(0)  # as `torch_step` does
    reference = LoopModel(23, 1, 6, 6, 6)
    torch.save(reference.state_dict(), tmp_path / "model.pt")
    model = load_pytorch_weights(str(tmp_path / "model.pt"))
    with torch.no_grad():
        expected = reference(torch.from_numpy(batch.tokens).long()).numpy()
    np.testing.assert_allclose(model(jnp.asarray(batch.tokens))[0], expected, atol=1e-5)

    optimizer = make_optimizer(config.optimizer, 1000)
    start = dataclasses.replace(
        init_train_state(config, optimizer), params=nnx.state(model, nnx.Param)
    )
    ours = jax_steps.CompiledStep(make_train_step(config, optimizer), lambda: start, batch)
    loop = torch_step(config, batch.tokens, batch.targets)
    losses = [float(ours().loss) for _ in range(5)]
    np.testing.assert_allclose([loop() for _ in range(5)], losses, rtol=1e-5)
    assert losses[-1] < losses[0]


def in_this_process(function: Any, **given: Any) -> Any:
    return function(**given)


def test_programs_beside_ours(torch, monkeypatch):
    fixed_times(training, monkeypatch, ours=0.5, **{"PyTorch loop": 2.0})
    ours = jax_steps.our_step(small_config("seed"))
    monkeypatch.setattr(training, "JAX_STEPS", {"ours": lambda _: ours})
    monkeypatch.setattr(training, "call_isolated", in_this_process)
    rows = training.compare_programs(small_config("seed"), EFFORT)
    assert {name: row["times_slower"] for name, row in rows.items()} == {
        "ours": 1,
        "PyTorch loop": 4,
    }
    assert [row["tokens_per_s"] for row in rows.values()] == [2 * 7 / 0.5, 2 * 7 / 2]
    assert rows["ours"]["compiled_mb"] == ours.compiled_bytes / 1e6
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


def test_precisions_count_six_operations_per_parameter_and_token(monkeypatch):
    fixed_times(training, monkeypatch, float32=0.5, bfloat16=0.125, product=0.25)
    results = training.compare_precisions(small_config("seed"), EFFORT, size=8)
    flops, product_flops = 6 * results["parameters"] * 2 * 7, 2 * 8**3
    row = results["bfloat16"]
    assert row["times_faster_than_float32"] == 4
    assert row["tokens_per_s"] == 2 * 7 / 0.125
    assert row["gflops"] == pytest.approx(flops / 0.125 / 1e9)
    assert row["share_of_product"] == pytest.approx((flops / 0.125) / (product_flops / 0.25))
    assert results["float32"]["ms"] == 500


def test_an_embedding_that_is_the_head_counts_once():
    config = small_config("base")
    model = LanguageModel(config.model, rngs=nnx.Rngs(0))
    parameters = sum(x.size for x in nnx.to_flat_state(nnx.state(model, nnx.Param)).leaves)
    assert training.count_parameters(config) == parameters


def test_decoding_compares_every_way_to_come_by_a_token(monkeypatch):
    config = ModelConfig(
        vocab_size=23, num_layers=1, hidden_dim=6, key_dim=6, value_dim=6, num_heads=2, mlp_dim=11
    )
    fixed_times(decoding, monkeypatch, long=2.0, products=0.5, prefill=0.25, streaming=3.0)
    results = decoding.compare(
        config, EFFORT, contexts=(1, 2, 9), prefill=8, streams=2, new_tokens=5
    )
    per_second = {"recompute": 1, "streams": 2 * 5, "prefill": 8 / 0.25, "products": 5 / 0.5}
    per_second |= {"short": 5, "middle": 5, "long": 5 / 2, "streaming": 5 / 3}
    assert results["us_per_token"] == pytest.approx({n: 1e6 / r for n, r in per_second.items()})
    assert results["ratios"] == pytest.approx(
        {
            "long_context_to_short": 2,
            "recompute_to_ours": 5,
            "ours_to_products": 2,
            "one_stream_to_many": 2,
            "writing_to_prefill": 8 / 0.25 / 5,
            "streaming_to_not": 3,
        }
    )
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


def test_memory_of_a_step_by_both_accounts(monkeypatch):
    monkeypatch.setattr(memory, "call_isolated", in_this_process)
    row = memory.compare(small_config("seed"))
    json.dumps(row)
    assert row["length"] == 7
    assert row["temporary_bytes"] > 0
    assert row["scan_temporary_bytes"] not in (0, row["temporary_bytes"])
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
        (["attention"], "no --out: name a folder for the table and the pictures"),
        (["attention", "--out=x", "--only=recal"], "'recal': no such measurement; did you mean"),
        (["ops", "attention"], "attention writes a folder of its own"),
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
