"""``benchmark.py ladder`` at tiny sizes: learners, losses and the report, never a time."""

import dataclasses
import importlib.util
import itertools
import json
import math
import random
import subprocess

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from processes import ROOT, assert_each_refused
from small_runs import small_config

from benchmarks import tables
from benchmarks.ladder import jax_learners, peers, report, requests, timed_training
from benchmarks.ladder.peers import OURS, Peer, find_peer
from benchmarks.ladder.timed_training import hold_out_training_text, make_learner
from simplernn_jax.data.token_store import prepare_corpus
from simplernn_jax.errors import UserError
from simplernn_jax.training.optimizer import make_optimizer

pytestmark = pytest.mark.oldest_python

WORDS = ["to", "be", "or", "not", "that", "is", "the", "question"]
NEEDS_TORCH = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed"
)
PROGRAMS = [
    OURS,
    "gru",
    pytest.param("gpt_matched", marks=NEEDS_TORCH),
    pytest.param("lstm", marks=NEEDS_TORCH),
]


@pytest.fixture(scope="module")
def rung(tmp_path_factory):
    """A configuration, its tokens, and the folder of its text."""
    folder = tmp_path_factory.mktemp("rung")
    (folder / "texts").mkdir()
    draw = random.Random(0)
    for number, words in enumerate((130, 70, 300, 41, 97)):
        text = " ".join(draw.choices(WORDS, k=words))
        (folder / "texts" / f"{number}.txt").write_text(text)
    config = small_config(
        "residual",
        **{"source": str(folder / "texts"), "tokenizer": "char", "vocab_size": 20},
        **{"validation_fraction": 0.5, "sequence_length": 11, "batch_size": 3, "steps": 5},
    )
    return config, prepare_corpus(config.data, 0, str(folder / "tokens")), folder


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_learns_and_scores_each_held_out_token(name, rung):
    config, corpus, _ = rung
    learner = make_learner(name, config, corpus, 40, 1e-2, 0)
    before = learner.evaluate()
    for _ in range(40):
        learner.step()
    learner.wait()
    assert learner.evaluate() < before - 0.3
    estimate = learner.random_blocks(500)
    assert (estimate is not None) == name.startswith("gpt")
    assert learner.parameters > 100


@pytest.mark.parametrize("name", ["gru", pytest.param("lstm", marks=NEEDS_TORCH)])
def test_a_recurrent_peer_carries_its_state_over_a_document_and_not_beyond(name, rung, monkeypatch):
    """However the text is laid out, each prediction sees its document and nothing else."""
    config, corpus, _ = rung
    learner = make_learner(name, config, corpus, 1, 1e-2, 0)
    whole = learner.evaluate()
    module = importlib.import_module(type(learner).__module__)
    for size, sequences in ((35, 5), (7, 1)):
        monkeypatch.setattr(module, "BATCH_TOKENS", size)
        monkeypatch.setattr(module, "MAX_BATCH_SIZE", sequences)
        assert learner.evaluate() == pytest.approx(whole, rel=1e-5)


@NEEDS_TORCH
def test_nanogpts_architecture_has_its_published_size_and_is_causal():
    import torch

    from benchmarks.ladder.torch_learners import GPT, learning_rate

    sizes = {
        name: sum(p.numel() for p in GPT(find_peer(name, small_config()), 65).parameters())
        for name in ("gpt_cpu", "gpt_gpu")
    }
    # Its README says 0.80M and 10.65M, without the positions.
    assert sizes == {"gpt_cpu": 804_096, "gpt_gpu": 10_745_088}
    model = GPT(Peer("gpt", 2, 8, 2, 7, 1, 1, 1e-3), 5)
    tokens = torch.tensor([[0, 1, 2, 3, 4, 0, 1]])
    changed = tokens.clone()
    changed[0, 4] = 2
    differs = (model(tokens)[0] != model(changed)[0]).any(-1)[0]
    assert differs.tolist() == [False] * 4 + [True] * 3
    rates = [learning_rate(step, 2000, 1.0) for step in (0, 99, 100, 1050, 2000)]
    np.testing.assert_allclose(rates, [0.01, 1.0, 1.0, 0.55, 0.1])


def test_peers_without_sizes_of_their_own_have_as_many_weights_as_ours(rung):
    config, _, _ = rung
    wide = small_config("residual", hidden_dim=256, key_dim=256, value_dim=256, mlp_dim=512)
    for name in ("lstm", "gru"):
        peer = find_peer(name, wide)
        assert (peer.batch, peer.length) == (wide.data.batch_size, wide.data.sequence_length)
        weights = 2 * {"lstm": 8, "gru": 6}[name] * peer.width**2
        ours = peers.count_parameters(wide) - 259 * 256
        assert 0.85 < weights / ours < 1.15
    assert find_peer("gpt_cpu_compiled", config).is_compiled
    sizes = ("hidden_dim", "key_dim", "value_dim")
    large, larger = (
        find_peer("gru", small_config("residual", **dict.fromkeys(sizes, size)))
        for size in (512, 1024)
    )
    assert large.rate * large.width == pytest.approx(larger.rate * larger.width)
    assert 272 < large.width < larger.width
    for tokenizer, gpt in (("char", "gpt_cpu"), ("byte", "gpt_matched")):
        names = (OURS, gpt, f"{gpt}_compiled", "lstm", "gru")
        assert peers.default_names(tokenizer) == names
        assert set(names) <= set(peers.known_names())


def test_the_last_tenth_of_the_training_text_is_held_out_to_choose_a_rate(rung):
    _, corpus, _ = rung
    tuned = hold_out_training_text(corpus)
    parts = tuned.train, tuned.validation
    np.testing.assert_array_equal(np.concatenate([x.tokens for x in parts]), corpus.train.tokens)
    assert len(tuned.validation.tokens) == pytest.approx(len(corpus.train.tokens) / 10, abs=1)
    for part in parts:
        assert part.document_starts[0] == 0
        assert part.document_starts[-1] < len(part.tokens)
    cut = len(tuned.train.tokens)
    starts = {*tuned.train.document_starts, *(tuned.validation.document_starts + cut)}
    assert starts - {cut} == {*corpus.train.document_starts} - {cut}


class Falling:
    """A learner whose loss falls by a tenth of its rate each step."""

    parameters = 7

    def __init__(self, name, config, corpus, steps, rate, seed):
        self.rate, self.loss = rate or 0.5, 9.0 + seed

    def step(self):
        self.loss -= self.rate / 10

    def wait(self):
        pass

    def evaluate(self, limit_tokens=0):
        return self.loss - (0.25 if limit_tokens else 0)

    def random_blocks(self, tokens):
        return None


@pytest.fixture
def falling(monkeypatch):
    monkeypatch.setattr(report, "call_isolated", lambda call, **given: call(**given))
    monkeypatch.setattr(timed_training, "make_learner", Falling)


def test_rungs_are_tuned_and_measured_into_one_folder(rung, falling, tmp_path, capsys):
    config, _, _ = rung
    request = requests.Request("first", config, 0.0, 2, (OURS, "gru"), (0.1, 0.4, 0.2))
    report.run([request._replace(seeds=1, names=(OURS,))], tmp_path)
    second = request._replace(rung="second", seconds=1e-4, seeds=1, rates=())
    report.run([request, second], tmp_path)
    report.run([request._replace(rung="third", seeds=1, names=("gru",))], tmp_path)
    report.run([request._replace(rung="third", seeds=1, names=(OURS,))], tmp_path)
    first, second, third = tables.read_results(tmp_path / "results.json", 1, "rungs").values()
    assert [(run["rate"], run["seed"]) for run in first["runs"]] == [
        *((None, 0), (None, 1)),
        *((0.4, 0), (0.4, 1)),
    ]
    assert [run["loss"] for run in first["runs"]] == pytest.approx(
        [9 - 5 * 0.05, 10 - 5 * 0.05, 9 - 5 * 0.04, 10 - 5 * 0.04]
    )
    assert [each["rate"] for each in first["tried"]] == [0.1, 0.4, 0.2]
    assert [each["curve"] for each in first["tried"]] == [[]] * 3
    assert second["runs"][1]["rate"] == find_peer("gru", config).rate
    assert [run["program"] for run in third["runs"]] == ["gru", OURS]
    assert [each["program"] for each in third["tried"]] == ["gru"] * 3
    assert report.choose_rate("gru", request._replace(rates=(0.3,)), "") == (0.3, [])
    for run in (*first["runs"], *second["runs"]):
        assert run["tokens"] == run["steps"] * 3 * 11
        seconds, losses = zip(*run["curve"], strict=True)
        assert list(seconds) == sorted(seconds)
        assert losses[-1] == pytest.approx(run["loss"] - 0.25)
        ends = report.curve_of(run, "nats/char")[-1]
        assert ends == (seconds[-1], pytest.approx(run["loss"]))
    page = (tmp_path / "table.md").read_text()
    assert "| program | rate 0.1 | rate 0.4 | rate 0.2 |" in page
    assert page.endswith(capsys.readouterr().out.split("\n\n")[-2] + "\n")
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("key", ["seconds", "source", "processor", "settings", "jax"])
def test_results_of_other_conditions_are_kept(key, rung, falling, tmp_path):
    request = requests.Request("first", rung[0], 0.0, 1, (OURS,), ())
    report.run([request], tmp_path)
    path = tmp_path / "results.json"
    content = json.loads(path.read_text())
    result = content["rungs"]["first"]
    (result if key in result else result["machine"])[key] = "another"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"of first have {key} another, .*; name another --out"):
        report.run([request._replace(rung="new"), request], tmp_path)
    assert json.loads(path.read_text()) == content


@pytest.mark.parametrize("error", [subprocess.CalledProcessError(1, "x"), UserError("no room")])
def test_a_failed_program_ends_no_other(error, rung, falling, monkeypatch, tmp_path, capsys):
    def fail(call, **given):
        if given["name"] == "gru" and given["config"].data.batch_size == 3:
            raise error
        return call(**given)

    config = rung[0]
    larger = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=5))
    first = requests.Request("first", config, 0.0, 1, ("gru", OURS), ())
    second = first._replace(rung="second", config=larger)
    report.run([first._replace(names=("gru",))], tmp_path)
    monkeypatch.setattr(report, "call_isolated", fail)
    with pytest.raises(UserError, match=r"failed, with the output above: gru of first$"):
        report.run([first, second], tmp_path)
    assert f"  gru: {error}\n" in capsys.readouterr().out
    rungs = tables.read_results(tmp_path / "results.json", 1, "rungs")
    programs = {name: [run["program"] for run in each["runs"]] for name, each in rungs.items()}
    assert programs == {"first": ["gru", OURS], "second": ["gru", OURS]}


def test_a_rate_that_diverges_is_not_the_best(rung, monkeypatch):
    losses = {0.1: math.nan, 0.2: 3.0, 0.4: 2.0}
    monkeypatch.setattr(
        report, "train", lambda *given, **_: {"rate": given[3], "loss": losses[given[3]]}
    )
    request = requests.Request("first", rung[0], 0.0, 1, ("gru",), tuple(losses))
    assert report.choose_rate("gru", request, "")[0] == 0.4


def test_warmup_of_ours_is_at_most_a_tenth_of_a_shorter_training(rung, monkeypatch):
    config, corpus, _ = rung
    config = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=100),
        train=dataclasses.replace(config.train, steps=1000),
    )
    made = []

    def record(settings, steps):
        made.append((settings.warmup_steps, steps))
        return make_optimizer(settings, steps)

    monkeypatch.setattr(jax_learners, "make_optimizer", record)
    for steps in (50, 999, 1000, 2000):
        make_learner(OURS, config, corpus, steps, None, 0)
    assert made == [(5, 50), (99, 999), (100, 1000), (100, 2000)]


def test_time_to_a_loss_is_interpolated_and_compared_with_nanogpt():
    curve = [(1.0, 3.0), (3.0, 2.0), (4.0, 1.0)]
    assert report.seconds_until(curve, 2.5) == 2
    assert report.seconds_until(curve, 3.5) == 1
    assert report.seconds_until(curve, 0.5) is None

    def run(name, seed, curve):
        row = dict.fromkeys(("parameters", "rate", "steps", "random blocks"), 1)
        row |= {"program": name, "seed": seed, "seconds": curve[-1][0], "curve": curve}
        return row | {"loss": curve[-1][1]}

    slow = [(10.0, 2.874), (20.0, 1.874), (40.0, 1.8)]
    runs = [run(OURS, 0, [(2.0, 1.874), (9.0, 1.5)]), run(OURS, 1, [(4.0, 1.874), (9.0, 1.6)])]
    result = {"unit": "nats/char", "source": "/texts/tinyshakespeare.txt"}
    result["runs"] = [*runs, run("gpt_cpu", 0, slow)]
    ours, nanogpt = report.summarize("shakespeare", result)
    assert (ours["nats/char"], ours["range"]) == (pytest.approx(1.55), pytest.approx(0.1))
    assert ours["seconds to 1.874"] == 3
    assert ours["of nanoGPT's run"] == 3 / 40
    assert ours["of its time to that"] == 3 / 20
    assert nanogpt["of nanoGPT's run"] == 0.5
    other, _ = report.summarize("shakespeare", result | {"source": "/texts/other.txt"})
    assert "seconds to 1.874" not in other


def test_programs_have_readable_names_and_looks_that_differ(monkeypatch):
    figures = []
    monkeypatch.setattr(report, "png", figures.append)

    def rung_of(tokenizer):
        curve = {"loss": 1.0, "curve": [[1.0, 2.0], [2.0, 1.0]]}
        runs = [curve | {"program": name} for name in peers.default_names(tokenizer)]
        return {"unit": "nats/char", "source": "texts", "runs": runs}

    report.draw({"shakespeare": rung_of("char"), "base": rung_of("byte")})
    (figure,) = figures
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "SimpleRNN (ours)",
        "nanoGPT (its CPU settings)",
        "nanoGPT (its CPU settings, compiled)",
        "LSTM",
        "GRU",
        "nanoGPT (our size)",
        "nanoGPT (our size, compiled)",
    ]
    drawn = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 2]
    named = [handle.get_color() for handle in legend.legend_handles]
    assert [line.get_color() for line in drawn[:5]] == named[:5]

    styles = [report.plot_style(name) for name in peers.known_names()]
    for key in ("label", "marker"):
        assert len({style[key] for style in styles}) == 9
    for one, other in itertools.combinations([to_rgb(style["color"]) for style in styles], 2):
        assert math.dist(one, other) > 0.25


def test_peers_of_torch_are_refused_where_it_is_missing(rung, monkeypatch):
    monkeypatch.setattr(requests.importlib.util, "find_spec", lambda _: None)
    source = rung[0].data.source
    with pytest.raises(UserError, match=r"gpt_matched, .*torch is not .*--programs=ours,gru"):
        requests.make_requests(["base"], source, ["1"], 1, [], [])
    rungs, programs = ["base", "tiny"], ["ours", "gru"]
    made = requests.make_requests(rungs, source, ["1", "0"], 1, programs, ["1e-3"])
    assert [(each.rung, each.seconds) for each in made] == [("base", 1.0), ("tiny", 0.0)]
    assert all((each.names, each.rates) == (programs, [1e-3]) for each in made)
    same = requests.make_requests(rungs, source, ["3"], 1, programs, [])
    assert [each.seconds for each in same] == [3.0, 3.0]
    endless = small_config(steps=0, epochs=3, validation_fraction=0.5)
    monkeypatch.setattr(requests.config_files, "load_config", lambda _: endless)
    with pytest.raises(UserError, match=r"base: has no number of steps; .*--seconds=60"):
        requests.make_requests(["base"], source, ["0"], 1, programs, [])
    monkeypatch.setattr(requests.config_files, "load_config", lambda _: small_config())
    with pytest.raises(UserError, match="base: holds out no text"):
        requests.make_requests(["base"], source, ["1"], 1, programs, [])


def test_bad_requests_are_one_line(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"format": 4, "results": {}}))
    with pytest.raises(UserError, match="not results of this benchmark"):
        tables.read_results(tmp_path / "results.json", 1, "rungs")
    ladder = ["ladder", f"--out={tmp_path}"]
    assert_each_refused(
        ROOT / "scripts" / "benchmark.py",
        (["ladder"], "ladder: name its folder, --out"),
        ([*ladder, "--rungs=tiny,bas"], "'bas': no such configuration; did you mean 'base'?"),
        ([*ladder, "--rungs=base,base"], "'base': this configuration is named twice"),
        ([*ladder, "--rungs="], "--rungs: name a configuration"),
        ([*ladder, "--seconds=1,2"], "--seconds=1,2: 2 values for 1 rung; give one, or one for"),
        ([*ladder, "--seconds=-1"], "--seconds=-1: must be 0 or more"),
        ([*ladder, "--seconds=soon"], "could not convert string to float: 'soon'"),
        ([*ladder, "--source=missing.txt"], "missing.txt"),
        ([*ladder, "--rates=1e-3,fast"], "could not convert string to float: 'fast'"),
        ([*ladder, "--rates=0"], "--rates=0: list different positive numbers"),
        ([*ladder, "--rates=1,1.0"], "--rates=1,1.0: list different positive numbers"),
        ([*ladder, "--programs=lstn"], "'lstn': no such program; did you mean 'lstm'?"),
        ([*ladder, "--programs=gru,gru"], "'gru': this program is named twice"),
        ([*ladder, "--calls=2"], "--calls: not of ladder"),
        (["sizes", "--rungs=base"], "--rungs: not of sizes"),
        imports="benchmarks.scaling",
    )
