"""What ``benchmark.py attention`` computes, at tiny sizes: counts, learning and the page."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from benchmarks.attention import communication, comparison, distance, report, students
from benchmarks.attention.cost import crossing, flops_per_token
from benchmarks.attention.learning import Lesson, accuracies, learn, task_config
from benchmarks.attention.memory import state_bytes
from benchmarks.attention.program_work import count_work
from benchmarks.attention.sides import ATTENTION, RECURRENCE, SIDES, config_of
from benchmarks.attention.table import Line, markdown
from benchmarks.attention.table import six_aspects as table_of_aspects
from benchmarks.training import count_parameters
from simplernn_jax.config import ModelConfig
from simplernn_jax.data.tasks import Copying
from simplernn_jax.errors import UserError

M, N, P = 3, 5, 7
X, Y = jnp.ones((M, N)), jnp.ones((N, P))


def test_products_and_elementwise_operations_count():
    work = count_work(lambda x, y: jnp.tanh(x @ y) + 1, X, Y)
    assert work == (2 * M * N * P + 2 * M * P, 3)


def test_a_condition_counts_its_dearest_branch():
    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: jnp.sin(jnp.sin(x)), jnp.cos, x)

    assert count_work(either, X) == (2 * M * N, 2)


def test_a_loop_counts_as_often_as_it_runs_and_waits_only_for_what_it_carries():
    def loop(x):
        def body(carry, row):
            return carry + jnp.exp(jnp.sin(row)), None

        return jax.lax.scan(body, jnp.zeros(N), x)[0]

    # Sines and exponentials need nothing from the turn before; sums do.
    assert count_work(loop, X) == (3 * M * N, 3 + (M - 1))
    assert count_work(lambda x: jax.lax.map(lambda row: jnp.exp(jnp.sin(row)), x), X) == (30, 2)


def test_the_gradient_of_a_rematerialised_function_counts_what_is_computed_again():
    def loss(x, again):
        def function(x):
            return jnp.sin(jnp.exp(x))

        return jnp.sum(jnp.sin((jax.checkpoint(function) if again else function)(x)))

    once, twice = (count_work(jax.grad(lambda x, n=n: loss(x, n)), X).flops for n in (False, True))
    # The exponential, of which the gradient takes the cosine.
    assert twice >= once + M * N


def test_what_cannot_be_counted_is_refused():
    def endless(x):
        return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x + 1, x)

    with pytest.raises(ValueError, match="the work of while cannot be counted"):
        count_work(endless, X)


def test_sides_have_as_many_parameters_and_the_growth_that_theory_says():
    ours, theirs = (count_parameters(config_of(side, 256)) for side in SIDES)
    assert abs(ours - theirs) < 0.02 * ours
    model = config_of(RECURRENCE, 1)
    heads, width, layers = model.model.num_heads, model.model.hidden_dim, model.model.num_layers
    recurrent = 4 * layers * (heads * (width // heads) ** 2 + 3 * width)
    for length in (256, 1024):
        assert state_bytes(config_of(RECURRENCE, length).model) == recurrent
        cached = 4 * layers * (2 * length * width + 3 * width + 1)
        assert state_bytes(config_of(ATTENTION, length).model) == cached
    counts = {side: [flops_per_token(side, n) for n in (256, 512)] for side in SIDES}
    for kind in ("training", "reading", "writing"):
        (ours, ours_longer), (theirs, theirs_longer) = (
            [count[kind] for count in counts[side]] for side in SIDES
        )
        assert ours_longer == pytest.approx(ours, rel=0.01)
        assert theirs_longer > 1.05 * theirs


def test_curves_cross_where_lines_in_logarithms_do():
    curve = {"4": {"a": 1.0, "b": 4.0}, "16": {"a": 4.0, "b": 4.0}, "64": {"a": 16.0, "b": 4.0}}
    assert crossing(curve, "a", "b") == pytest.approx(16)
    del curve["16"]
    assert crossing(curve, "a", "b") == pytest.approx(16)
    assert crossing({"4": curve["4"]}, "a", "b") is None
    assert crossing({"64": curve["64"]}, "a", "b") == 0


@pytest.mark.parametrize(
    ("ours", "theirs", "options", "verdict"),
    [
        (10.0, 40.0, {}, "SimpleRNN, 4.00x"),
        (40.0, 10.0, {}, "attention, 4.00x"),
        (40.0, 10.0, {"more_is_better": True}, "SimpleRNN, 4.00x"),
        (100.0, 103.0, {}, "equal"),
        (1.0, None, {}, ""),
        (1.9, 1.8, {"as_ratio": False, "equal": 0.02}, "attention"),
        (1.81, 1.8, {"as_ratio": False, "equal": 0.02}, "equal"),
        (0.9, 0.5, {"as_ratio": False, "more_is_better": True}, "SimpleRNN"),
    ],
)
def test_the_better_side_is_named(ours, theirs, options, verdict):
    values = {RECURRENCE: ours, ATTENTION: theirs}
    assert Line("", values, str, **options).verdict() == verdict


def test_tables_are_markdown():
    assert markdown(["a", "long"], [["1", "2"]]) == "| a | long |\n| - | ---- |\n| 1 | 2    |\n"


COPY = Copying(count=2, symbols=3, blanks=2, scattered=False)


def test_a_small_model_learns_to_copy_and_is_tested_on_other_rows():
    lessons = [Lesson(COPY, 60, 32), Lesson(COPY, 60, 16)]
    sizes = dict.fromkeys(("hidden_dim", "key_dim", "value_dim"), 16)
    model = ModelConfig(num_layers=1, num_heads=1, mlp_dim=16, **sizes)
    config = task_config(model, lessons, "muon", 3e-2)
    assert config.train.steps == 120
    learned = learn(config, lessons)
    assert learned.loss < 0.5 * math.log(3)
    assert accuracies(learned, {6: COPY}, 64)[6] > 0.7


def test_every_student_is_trained_at_its_rates_and_the_best_is_tested(monkeypatch):
    monkeypatch.setattr(students, "WIDTH", 8)
    lessons = [Lesson(COPY, 2, 4)]
    result = students.examine(
        students.PLAIN, lessons, {"muon": (1e-2,), "adamw": (1e-3,)}, {"same": {6: COPY}}, 8
    )
    assert set(result["losses"]) == {"muon 0.01", "adamw 0.001"}
    assert result["losses"][result["best"]] == min(result["losses"].values())
    assert 0 <= result["accuracy"]["same"]["6"] <= 1
    assert result["state_bytes"] == students.LAYERS * 8 * 8 * 4


def test_a_device_receives_the_same_whatever_the_length_and_attention_more():
    received = {
        side: [communication.bytes_received(side, length, 2, 1) for length in (32, 64)]
        for side in SIDES
    }
    model = config_of(RECURRENCE, 1).model
    key_dim, value_dim = (width // model.num_heads for width in (model.key_dim, model.value_dim))
    # Both passes: K (V + 1) numbers of each head, the true states, and the convolution's inputs.
    state = model.num_heads * key_dim * value_dim
    message = model.num_heads * key_dim * (value_dim + 1)
    least = 2 * 4 * (message + state + 3 * model.hidden_dim)
    assert received[RECURRENCE][0] == received[RECURRENCE][1] == pytest.approx(least, rel=0.01)
    assert received[ATTENTION][1] > 1.5 * received[ATTENTION][0]


def test_what_is_tested_goes_up_to_four_times_what_was_learned():
    for name, (lesson, exams) in distance.tasks().items():
        for number, task in exams.items():
            assert task.vocab_size == lesson.vocab_size
            assert number == (task.distances[0] if name == "needle" else task.length)
        if name == "needle":
            assert max(exams) == 4 * max(lesson.distances)
        else:
            assert max(exams) == 4 * lesson.length


def by_side(ours, theirs):
    return {RECURRENCE: ours, ATTENTION: theirs}


def made_up():
    """Results in the form that the measurements give."""
    lengths = (256, 1024)
    counts = dict.fromkeys(("training", "reading", "writing"), 1e6)
    student = {"state_bytes": 8, "best": "muon 0.03", "losses": {"muon 0.03": 0.5}}
    recall = [
        student
        | {
            "name": name,
            "parameters": parameters,
            "accuracy": {"same": {"4": 1.0, "16": share}, "longer": {"4": 0.9, "16": share / 2}},
        }
        for name, parameters, share in (
            ("SimpleRNN 8 x 8", 9, 0.53),
            ("SimpleRNN 64 x 64", 99, 0.97),
            ("attention", 10, 0.71),
            ("seed stack (plain)", 9, 0.5),
        )
    ]
    distance = [each | {"accuracy": {"accuracy": each["accuracy"]["same"]}} for each in recall[:3]]
    side = {"parameters": 7, "best_rate": 0.1, "rates": {"0.1": 2.0}, "bits_per_byte": [2.0, 2.1]}
    return {
        "parallelism": [
            {
                "length": n,
                "tokens": 4096,
                "layers": 1,
                "us_per_token": {"attention": n, "scan": 900.0, "chunks": 9.0, "ours": 5.0},
                "chain": {"attention": 9.0, "scan": n, "chunks": n / 8},
            }
            for n in lengths
        ],
        "memory": [
            {
                "length": n,
                "layers": 4,
                "training_bytes": by_side(1e6, n * 1e4),
                "state_bytes": by_side(5, n),
            }
            for n in lengths
        ],
        "cost": {
            "flops_per_token": {str(n): by_side(counts, counts) for n in lengths},
            "reading_us": {str(n): by_side(2.0, n / 300) for n in lengths},
            "writing_us": {str(n): by_side(2.0, n) for n in lengths},
        },
        "communication": [
            {"length": n, "devices": 8, "bytes": by_side(3e4, n * 1e3)} for n in lengths
        ],
        "corpus": {
            "tokens": 5,
            **by_side(side | {"mean": 2.05, "spread": 0.1}, side | {"mean": 1.9, "spread": 0.2}),
        },
        "interpretability": [{"operator_error": 1e-7, "layer_error": 2e-7}],
        "recall": recall,
        "distance": {"copying": distance, "selective copying": distance, "needle": distance},
    }


def test_the_page_has_all_six_aspects_and_its_pictures(tmp_path):
    machine = {"processor": "p", "cores": 2, "jax": "j", "commit": "c"}
    results = {
        name: {"measured": measured, "seconds": 1.0, "quick": True, "machine": machine}
        for name, measured in made_up().items()
    }
    assert set(results) == set(comparison.MEASUREMENTS)
    first = report.write(tmp_path, json.loads(json.dumps(results)))
    page = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert first in page
    for aspect in ("parallelism", "long-range dependency", "memory", "computation"):
        assert f"| {aspect} " in first
    assert "| scalability " in first
    assert "| interpretability " in first
    pictures = [line.split("(")[1].rstrip(")") for line in page.splitlines() if "![" in line]
    assert len(pictures) == 6
    for name in pictures:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_models_of_as_many_parameters_are_compared():
    table = table_of_aspects(made_up())
    for row in table.splitlines():
        if "recall of 16 pairs, rows as in training" in row or "copying, rows of 16 tokens" in row:
            assert "53.0%" in row
            assert "71.0%" in row
            assert row.rstrip(" |").endswith("attention")
            assert "97.0%" not in row
    assert table.count("53.0%") == 4  # recall, copying, selective copying and the needle


def test_one_seed_names_no_winner():
    results = made_up()
    one = {"bits_per_byte": [2.0], "mean": 2.0, "spread": 0.0}
    for side, mean in ((RECURRENCE, 2.0), (ATTENTION, 1.0)):
        results["corpus"][side] |= one | {"mean": mean}
    (row,) = (row for row in table_of_aspects(results).splitlines() if "mean of 1 seed" in row)
    assert row.split("|")[-2].strip() == ""


def test_what_was_not_measured_again_is_kept(tmp_path, monkeypatch):
    class Fake:
        QUICK = FULL = communication.QUICK

        def __init__(self, result):
            self.measure = lambda sizes: result

    fakes = {name: Fake(result) for name, result in made_up().items()}
    monkeypatch.setattr(comparison, "MEASUREMENTS", fakes)
    comparison.run(tmp_path, True, ["memory"])
    comparison.run(tmp_path, False, ["cost"])
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [results[name]["quick"] for name in ("memory", "cost")] == [True, False]
    (tmp_path / "results.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"results.json: not JSON"):
        comparison.run(tmp_path, True, ["memory"])
    for other in ("[]", '{"memory": 1}', '{"memory": {"measured": []}}'):
        (tmp_path / "results.json").write_text(other, encoding="utf-8")
        with pytest.raises(UserError, match=r"results.json: not what this benchmark writes"):
            comparison.run(tmp_path, True, ["memory"])
