"""``benchmark.py attention`` at tiny sizes: counts, learning and the report."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from benchmarks.attention import comparison, corpus, resources, synthetic, work
from benchmarks.attention.program_work import count_work
from benchmarks.attention.report import ASPECTS, Line, Measurement
from benchmarks.attention.variants import ATTENTION, RECURRENCE, VARIANTS, config_of
from benchmarks.train_steps import count_parameters, state_bytes
from simplernn_jax.data.tasks import Copying
from simplernn_jax.errors import UserError

M, N, P = 3, 5, 7
X, Y = jnp.ones((M, N)), jnp.ones((N, P))


def test_matmuls_elementwise_operations_and_conditions_count():
    work = count_work(lambda x, y: jnp.tanh(x @ y) + 1, X, Y)
    assert work == (2 * M * N * P + 2 * M * P, 3)

    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: jnp.sin(jnp.sin(x)), jnp.cos, x)

    assert count_work(either, X) == (2 * M * N, 2)  # the branch with more operations


def test_a_loop_counts_every_iteration_and_is_chained_through_its_carry():
    def loop(x):
        def body(carry, row):
            return carry + jnp.exp(jnp.sin(row)), None

        return jax.lax.scan(body, jnp.zeros(N), x)[0]

    # Sines and exponentials do not depend on the iteration before; sums do.
    assert count_work(loop, X) == (3 * M * N, 3 + (M - 1))
    assert count_work(lambda x: jax.lax.map(lambda row: jnp.exp(jnp.sin(row)), x), X) == (30, 2)


def test_rematerialization_counts():
    def loss(x, remat):
        def function(x):
            return jnp.sin(jnp.exp(x))

        return jnp.sum(jnp.sin((jax.checkpoint(function) if remat else function)(x)))

    once, twice = (count_work(jax.grad(lambda x, n=n: loss(x, n)), X).flops for n in (False, True))
    # The exponential is recomputed for its cosine.
    assert twice >= once + M * N


def test_opaque_programs_are_refused():
    def endless(x):
        return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x + 1, x)

    with pytest.raises(ValueError, match="the work of while cannot be counted"):
        count_work(endless, X)


def test_variants_have_the_same_parameters_and_the_growth_of_theory():
    ours, theirs = (count_parameters(config_of(variant, 256)) for variant in VARIANTS)
    assert abs(ours - theirs) < 0.02 * ours
    model = config_of(RECURRENCE, 1).model
    heads, width, layers = model.num_heads, model.hidden_dim, model.num_layers
    recurrent = 4 * layers * (heads * (width // heads) ** 2 + 3 * width)
    for length in (256, 1024):
        assert state_bytes(config_of(RECURRENCE, length).model) == recurrent
        cached = 4 * layers * (2 * length * width + 3 * width + 1)
        assert state_bytes(config_of(ATTENTION, length).model) == cached
    counts = work.call_isolated(work.count_millions, work.NO_COMPILER, lengths=(256, 512))
    assert len(counts) == 3
    for curves in counts.values():
        assert curves[RECURRENCE]["512"] == pytest.approx(curves[RECURRENCE]["256"], rel=0.01)
        assert curves[ATTENTION]["512"] > 1.05 * curves[ATTENTION]["256"]


def test_a_device_receives_the_same_at_every_length_and_more_with_attention():
    received = {
        variant: [resources.received(variant, length, 2) for length in (32, 64)]
        for variant in VARIANTS
    }
    model = config_of(RECURRENCE, 1).model
    key_dim, value_dim = (width // model.num_heads for width in (model.key_dim, model.value_dim))
    # Both passes: K (V + 1) numbers of each head, the true states, and the convolution's inputs.
    state = model.num_heads * key_dim * value_dim
    message = model.num_heads * key_dim * (value_dim + 1)
    least = 2 * 4 * (message + state + 3 * model.hidden_dim)
    assert received[RECURRENCE][0] == received[RECURRENCE][1] == pytest.approx(least, rel=0.01)
    assert received[ATTENTION][1] > 1.5 * received[ATTENTION][0]


@pytest.mark.parametrize(
    ("ours", "theirs", "options", "verdict"),
    [
        (10.0, 40.0, {}, "SimpleRNN, 4.000x"),
        (40.0, 10.0, {}, "attention, 4.000x"),
        (40.0, 10.0, {"more_is_better": True}, "SimpleRNN, 4.000x"),
        (100.0, 103.0, {}, "equal"),
        (1.0, None, {}, ""),
        (1.0, 2.0, {"is_decisive": False}, ""),
        (1.9, 1.8, {"as_ratio": False, "tolerance": 0.02}, "attention"),
        (1.81, 1.8, {"as_ratio": False, "tolerance": 0.02}, "equal"),
        (0.9, 0.5, {"as_ratio": False, "more_is_better": True}, "SimpleRNN"),
    ],
)
def test_the_better_variant_is_named(ours, theirs, options, verdict):
    values = {RECURRENCE: ours, ATTENTION: theirs}
    assert Line("", "", values, **options).verdict() == verdict


COPY = Copying(count=2, symbols=3, blanks=2, scattered=False)


def test_a_small_model_learns_to_copy_through_a_curriculum():
    stages = [synthetic.Stage(COPY, 60, 32), synthetic.Stage(COPY, 60, 16)]
    trained = synthetic.train(synthetic.variant(f"{RECURRENCE} 8 x 8", 6), stages, "muon", 3e-2)
    assert trained.config.train.steps == 120
    assert trained.loss < 0.5 * math.log(3)
    assert synthetic.accuracy(trained, COPY, 64) > 0.7


def test_a_variant_is_trained_at_every_rate_and_the_best_is_tested(monkeypatch):
    monkeypatch.setattr(synthetic, "WIDTH", 8)
    stages, rates = [synthetic.Stage(COPY, 2, 4)], {"muon": (1e-2,), "adamw": (1e-3,)}
    tests = {"copy": {6: COPY}}
    results = synthetic.evaluate([synthetic.PLAIN], stages, rates, tests, 8)
    (row,) = results["rows"]
    losses = row["training loss by rate"]
    assert row["best rate"] == ["muon 0.01", "adamw 0.001"][losses.index(min(losses))]
    assert 0 <= results["curves"]["copy"][synthetic.PLAIN]["6"] <= 1
    assert row["state bytes"] == synthetic.LAYERS * 8 * 8 * 4


def test_distances_are_tested_up_to_four_times_those_of_training():
    for name, (task, tests) in synthetic.distance_tasks().items():
        for x, test in tests.items():
            assert test.vocab_size == task.vocab_size
            assert x == (test.distances[0] if name == "needle" else test.length)
        longest = max(task.distances) if name == "needle" else task.length
        assert max(tests) == synthetic.LONGER * longest


def made_up():
    """Results in the form of the measurements."""

    def curves(*labels):
        return {label: {"256": 1.0 + i, "1024": 2.0 + 9 * i} for i, label in enumerate(labels)}

    models = ["SimpleRNN 8 x 8", "SimpleRNN 64 x 64", "attention", "seed stack (plain)"]
    rows = [{"model": m, "parameters": n} for m, n in zip(models, (9, 99, 10, 9), strict=True)]
    accuracy = {"4": 1.0, "16": 0.5}
    right = {model: accuracy | {"16": 0.53 + 0.18 * i} for i, model in enumerate(models[:3])}
    right["attention"]["16"] = 0.71
    losses = {"bytes of training": 5, corpus.LOSSES: [2.0, 2.1]}
    return {
        "parallelism": {"curves": {q: curves(*work.PROGRAMS) for q in ("us/token", "chain")}},
        "memory": {"curves": {"MB": curves(*VARIANTS), "kB": curves(*VARIANTS)}},
        "cost": {"curves": {f"quantity {i}": curves(*VARIANTS) for i in range(5)}},
        "communication": {"curves": {"kB received": curves(*VARIANTS)}},
        "interpretability": {"rows": [{"error": 1e-7}, {"error": 2e-7}]},
        "corpus": {"rows": [{"variant": variant} | losses for variant in VARIANTS]},
        "recall": {"rows": rows, "curves": {"recall": right}},
        "distance": {"rows": rows, "curves": {"copying": right}},
    }


@pytest.fixture
def fakes(monkeypatch):
    results = made_up()
    assert set(results) == set(comparison.MEASUREMENTS)

    def fake(result):
        def measure(**_):
            """Something."""
            return result

        return measure

    measurements = {
        name: Measurement(fake(results[name]), real.lines, real.quick, real.full, real.x)
        for name, real in comparison.MEASUREMENTS.items()
    }
    monkeypatch.setattr(comparison, "MEASUREMENTS", measurements)
    return results


def test_the_report_has_all_six_aspects_and_its_pictures(tmp_path, fakes, capsys):
    comparison.run(tmp_path, True, list(fakes))
    page = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| error, worst layer " in capsys.readouterr().out
    for aspect in ASPECTS:
        assert f"| {aspect} " in page
    pictures = [line.split("(")[1].rstrip(")") for line in page.splitlines() if "![" in line]
    assert len(pictures) == sum("curves" in result for result in fakes.values())
    for name in pictures:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    # Models with the same number of parameters are compared.
    rows = [row for row in page.splitlines() if "% right" in row and "16" in row]
    assert len(rows) == 2  # recall, and copying at 4 times the length of training
    for row in rows:
        assert [cell.strip() for cell in row.split("|")[3:6]] == ["53.0", "71.0", "attention"]


def test_one_seed_names_no_winner(fakes):
    rows = fakes["corpus"]["rows"]
    rows[0] |= {corpus.LOSSES: [2.0]}
    rows[1] |= {corpus.LOSSES: [1.0]}
    (line,) = corpus.corpus_lines(fakes["corpus"])
    assert "mean of 1 seed" in line.measured
    assert line.verdict() == ""


def test_results_of_other_measurements_are_kept(tmp_path, fakes):
    comparison.run(tmp_path, True, ["memory"])
    comparison.run(tmp_path, False, ["cost"])
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [results[name]["quick"] for name in ("memory", "cost")] == [True, False]
    (tmp_path / "results.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"results.json: not JSON"):
        comparison.run(tmp_path, True, ["memory"])
    for other in ("[]", '{"memory": 1}', '{"memory": {"measured": []}}'):
        (tmp_path / "results.json").write_text(other, encoding="utf-8")
        with pytest.raises(UserError, match=r"results.json: not results of this benchmark"):
            comparison.run(tmp_path, True, ["memory"])
