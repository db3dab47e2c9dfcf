"""Benchmarks of ``scripts/benchmark.py`` at tiny sizes: results and arithmetic, never a time."""

import functools
import json
import os
import subprocess

import pytest
import small_runs
from processes import ROOT, assert_each_refused

from benchmarks import measure, minutes, scaling, tables, train_steps, training
from benchmarks.measure import Effort
from benchmarks.tables import Results, Table
from simplernn_jax.config import DataConfig, validate
from simplernn_jax.data import open_corpus
from simplernn_jax.errors import UserError

pytestmark = pytest.mark.oldest_python

EFFORT = Effort(blocks=2, calls=1)


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


def test_a_folder_keeps_the_tables_of_earlier_runs(tmp_path, capsys):
    curves = {"ms": {"ours": {"8": 1.0, "16": 3.0}, "theirs": {"8": 2.0}}}
    Results(tmp_path).add(Table("first", (), curves, "tokens", "plot", "A text."))
    assert "| 16     | 3.000 |" in capsys.readouterr().out
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    for number in (1, 2):
        Results(tmp_path).add(Table("second", [{"a": number}], data={"more": [number]}))
    page = (tmp_path / "table.md").read_text()
    parts = ("## first", "](plot.png)", "A text.", "ms:\n\n", "## second", "| 2 |")
    positions = [page.index(part) for part in parts]
    assert positions == sorted(positions)
    assert Results(tmp_path).tables["second"].data == {"more": [2]}
    (tmp_path / "results.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match=r"results.json: not results of this program"):
        Results(tmp_path)


def test_a_function_in_a_fresh_process_answers_or_its_failure_is_reported(capfd):
    name, variable = "BENCHMARK_TEST", "a value"
    assert measure.call_isolated(os.getenv, {name: variable}, key=name) == variable
    with pytest.raises(subprocess.CalledProcessError):
        measure.call_isolated(os.stat, path="no_such_file")
    assert "no_such_file" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"^nowhere: "):
        measure.call_isolated(open_corpus, config=DataConfig(source="nowhere"))


def test_rates_of_the_recurrence_count_its_necessary_products(monkeypatch):
    times = {"ours": 0.5, "chunks": 1.0, "scan": 3.0, "ceiling": 0.25}
    monkeypatch.setattr(
        training, "alternate", lambda calls, _: {name: [[times[name]]] for name in calls}
    )
    row = training.compare_forms(training.Shape(2, 19, 3, 5, 7), "float32", Effort(1, 1))
    multiply_adds = 2 * 19 * 3 * (2 + 4) * 5 * 7
    assert (row["ours ms"], row["scan / ours"]) == (500, 6)
    assert row["GFLOP/s"] == pytest.approx(2 * multiply_adds / 0.5 / 1e9)
    assert row["share"] == pytest.approx(row["GFLOP/s"] / row["ceiling GFLOP/s"])


def test_the_chosen_size_and_its_neighbor_are_trained_once_for_each_time(tmp_path, monkeypatch):
    def train(config, **_):
        trained.append((config.train.minutes, config.model.hidden_dim))
        return {"parameters": 1000 * config.model.hidden_dim, "bits/byte": 2.0}

    trained, results = [], Results(tmp_path / "out")
    text = str(small_runs.write_corpus(tmp_path / "text"))
    monkeypatch.setattr(minutes, "call_isolated", lambda function, **given: train(**given))
    for times in ([1.0], [1.0, 5.0]):
        for table in minutes.run(times, text, results.tables):
            results.add(table)
    # So little text gets the smallest size.
    assert trained == [(time, size.width) for time in (1, 5) for size in minutes.SIZES[:2]]


def test_bad_arguments_are_one_line():
    baselines = ["baselines", "--out=x"]
    assert_each_refused(
        ROOT / "scripts" / "benchmark.py",
        ([], "name a benchmark: python scripts/benchmark.py ops|train|decode|lookup|serve|startup"),
        (["attention", "--only=recal"], "'recal': no such measurement; did you mean"),
        (["opps"], "'opps': no such benchmark; did you mean 'ops'?"),
        (["ops", f"--out={ROOT / 'README.md'}"], "README.md: file exists"),
        (["ops", "--blocks=0"], "blocks"),
        (["completion"], "--workdirs: names no run"),
        ([*baselines, "--configs=tiny,bas"], "'bas': no such configuration; did you mean 'base'?"),
        (["minutes", "--minutes=1,five"], "--minutes: could not convert string to float: 'five'"),
        ([*baselines, "--programs=lstn"], "'lstn': no such program; did you mean 'lstm'?"),
        imports="benchmarks.scaling",
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    config = small_runs.small_config(
        **{"batch_size": 8, "sequence_length": 8, "steps": 3, "eval_tokens": 300},
        **{
            "source": small_runs.write_corpus(folder / "texts", documents=30),
            "validation_fraction": 0.3,
        },
    )
    return config, train_steps.train_on_corpus(config, str(folder)), folder


def test_every_technique_is_valid_and_trains_on_as_many_tokens():
    for _, _, given in scaling.TECHNIQUES:
        fields = {name: given[name] for name in given.keys() - {"seed"}}
        config = train_steps.change(scaling.small_run(), **fields)
        validate(config)
        tokens = config.data.batch_size * config.data.sequence_length
        assert tokens == scaling.BATCH * scaling.LENGTH


def test_a_cached_prefix_is_continued(trained, monkeypatch):
    _, result, folder = trained
    monkeypatch.setattr(scaling, "PREFIX", 9)
    prefilled, cached = scaling.cached_prefix(result, str(folder), Effort(1, 1))
    assert "9 tokens prefilled" in prefilled["change"]
    assert "loaded" in cached["change"]


def test_a_step_on_a_mesh_is_measured_by_kind(monkeypatch):
    fields = {"vocab_size": 264, "mlp_dim": 8, "num_heads": 4, "batch_size": 8, "data": 1}
    config = small_runs.small_config("parallel", **fields)
    monkeypatch.setattr(scaling.config_files, "load_config", lambda _: config)
    monkeypatch.setattr(scaling, "NAMES", ("tiny",))
    monkeypatch.setattr(scaling, "on_simulated_devices", lambda _, call, **given: call(**given))
    (table,) = scaling.run_sizes()
    data, fsdp, tensor = json.loads(json.dumps(table.rows))
    assert data["parameters"] == train_steps.count_parameters(config)
    # Gradients, with a few sums of single numbers.
    assert data["all-reduce"] * 1e6 == pytest.approx(4 * data["parameters"], abs=50)
    assert data["all-gather"] == data["reduce-scatter"] == 0 < fsdp["reduce-scatter"]
    assert fsdp["state and batch"] < data["state and batch"] / 4
    assert tensor["all-reduce"] > fsdp["all-reduce"]
