"""``benchmark.py baselines`` at tiny sizes: trainers, losses and the report, never a time."""

import importlib.util
import random

import pytest
from small_runs import small_config

from benchmarks.baselines import report, trainers
from benchmarks.baselines.trainers import OURS, find_baseline, make_trainer
from benchmarks.tables import Results
from simplernn_jax.data.token_store import prepare_corpus
from simplernn_jax.errors import UserError

WORDS = ["to", "be", "or", "not", "that", "is", "the", "question"]
NEEDS_TORCH = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed"
)
TORCH = [pytest.param(name, marks=NEEDS_TORCH) for name in ("lstm", "gru", "gpt_matched")]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A configuration and its tokens."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "texts").mkdir()
    draw = random.Random(0)
    for number, words in enumerate((130, 70, 300, 41, 97)):
        text = " ".join(draw.choices(WORDS, k=words))
        (folder / "texts" / f"{number}.txt").write_text(text)
    config = small_config(
        "parallel",
        **{"source": str(folder / "texts"), "tokenizer": "char", "vocab_size": 20},
        **{"validation_fraction": 0.5, "sequence_length": 11, "batch_size": 3, "steps": 5},
    )
    return config, prepare_corpus(config.data, 0, str(folder / "tokens"))


@pytest.mark.parametrize("name", [OURS, *TORCH])
def test_every_program_learns_and_scores_each_held_out_token(name, small):
    trained = make_trainer(name, *small, 40, 1e-2, 0)
    before = trained.evaluate()
    trained.take(15)
    trained.take(25)
    assert trained.evaluate() < before - 0.3
    assert trained.parameters > 100


@pytest.mark.parametrize("name", TORCH[:2])
def test_a_recurrent_baseline_carries_its_state_over_a_document_only(name, small, monkeypatch):
    """However the text is laid out, each prediction sees its document and nothing else."""
    from benchmarks.baselines import torch_trainers

    trained = make_trainer(name, *small, 1, 1e-2, 0)
    whole = trained.evaluate()
    for size, sequences in ((35, 5), (7, 1)):
        monkeypatch.setattr(torch_trainers, "BATCH_TOKENS", size)
        monkeypatch.setattr(torch_trainers, "MAX_BATCH_SIZE", sequences)
        assert trained.evaluate() == pytest.approx(whole, rel=1e-5)


@NEEDS_TORCH
def test_nanogpts_architecture_has_its_published_size():
    """Its README says 0.80M, without the positions."""
    from benchmarks.baselines.torch_trainers import GPT

    gpt = GPT(find_baseline("gpt_cpu", small_config()), 65)
    assert sum(p.numel() for p in gpt.parameters()) == 804_096


class Falling:
    """A trainer whose loss falls by a tenth of its rate each step."""

    parameters = 7

    def __init__(self, name, config, corpus, steps, rate, seed):
        self.rate, self.loss = rate or 0.5, 9.0 + seed

    def take(self, steps):
        self.loss -= steps * self.rate / 10

    def evaluate(self, limit_tokens=0):
        return self.loss - (0.25 if limit_tokens else 0)


@pytest.fixture
def falling(monkeypatch):
    monkeypatch.setattr(report, "call_isolated", lambda call, **given: call(**given))
    monkeypatch.setattr(trainers, "make_trainer", Falling)


def run(requests, out):
    results = Results(out)
    for table in report.run(requests, results.tables):
        results.add(table)


def test_programs_are_measured_into_one_folder(small, falling, tmp_path):
    request = report.Request("first", small[0], [0.0], 2, (OURS, "gru"), 0.2)
    run([request._replace(seeds=1, programs=(OURS,))], tmp_path)
    timed = request._replace(name="second", times=[1.0, 2.0], seeds=1, rate=None)
    run([request, timed], tmp_path)
    run([timed._replace(times=[1.0])], tmp_path)
    first, second = (Results(tmp_path).tables[f"baselines: {name}"] for name in ("first", "second"))
    found = [(r["program"], r["rate"], r["seed"]) for r in first.data["runs"]]
    assert found == [(OURS, None, 0), (OURS, None, 1), ("gru", 0.2, 0), ("gru", 0.2, 1)]
    losses = [9 - 5 * 0.05, 10 - 5 * 0.05, 9 - 5 * 0.02, 10 - 5 * 0.02]
    assert [r["loss"] for r in first.data["runs"]] == pytest.approx(losses)
    assert [(r["nats/char"], r["range"]) for r in first.rows] == [
        (pytest.approx(sum(pair) / 2), pytest.approx(1)) for pair in (losses[:2], losses[2:])
    ]
    rows = [(row["time"], row["program"]) for row in second.rows]
    assert rows == [(time, name) for time in (1, 2) for name in (OURS, "gru")]
    assert second.rows[1]["rate"] == find_baseline("gru", small[0]).rate
    curves = second.panels["nats/char"]
    assert curves["GRU"] == {"1": second.rows[1]["nats/char"], "2": second.rows[3]["nats/char"]}


def test_bad_requests_are_one_line(small, monkeypatch):
    source = small[0].data.source

    def request(times, source=source):
        return report.make_requests(("base", "tiny"), source, times, 1, (OURS,), None)

    found = request([1.0, 2.0])
    assert [(each.name, each.times) for each in found] == [
        ("base", [1.0, 2.0]),
        ("tiny", [1.0, 2.0]),
    ]
    monkeypatch.setattr(report.config_files, "load_config", lambda _: small_config())
    with pytest.raises(UserError, match="base: holds out no text"):
        request([1.0])
