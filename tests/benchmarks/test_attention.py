"""``benchmark.py attention`` at tiny sizes: counts, tasks, learning and the table of aspects."""

import math

import numpy as np
import pytest

from benchmarks.attention import resources, synthetic
from benchmarks.attention.aspects import ATTENTION, RECURRENCE, VARIANTS, config_of, line
from benchmarks.train_steps import count_parameters


def test_variants_have_the_same_parameters_and_the_flops_of_theory():
    ours, theirs = (count_parameters(config_of(variant, 256)) for variant in VARIANTS)
    assert abs(ours - theirs) < 0.02 * ours
    counts = resources.count_mflops((256, 512))
    for kind, passes in (("training", 3), ("prefill", 1), ("decode", 1)):
        curves = counts[f"MFLOPs/token, {kind}"]
        # Every parameter is in a matmul, of 2 operations per token.
        for variant in VARIANTS:
            assert curves[variant]["256"] == pytest.approx(2 * passes * ours / 1e6, rel=0.35)
        assert curves[RECURRENCE]["512"] == pytest.approx(curves[RECURRENCE]["256"], rel=0.01)
        assert curves[ATTENTION]["512"] > 1.05 * curves[ATTENTION]["256"]


def test_a_device_receives_the_same_at_every_length_and_more_with_attention():
    received = resources.kilobytes_received((32, 64), 2)
    assert received[RECURRENCE]["64"] == pytest.approx(received[RECURRENCE]["32"], rel=0.01)
    assert received[ATTENTION]["64"] > 1.5 * received[ATTENTION]["32"]


def test_the_better_variant_is_named():
    cases = [
        ((10.0, 40.0), {}, "SimpleRNN, 4.000x"),
        ((40.0, 10.0), {"more_is_better": True}, "SimpleRNN, 4.000x"),
        ((100.0, 103.0), {}, "equal"),
        ((1.0, None), {}, ""),
        ((1.0, 2.0), {"is_decisive": False}, ""),
        ((1.81, 1.8), {"tolerance": 0.02}, "equal"),
    ]
    for values, options, better in cases:
        assert line("", "", dict(zip(VARIANTS, values, strict=True)), **options)["better"] == better


@pytest.mark.parametrize(
    ("task", "solve"),
    [
        # Keys are in [1, 7], values in [8, 14].
        (synthetic.recall((2, 5), 17, 7), lambda seen: seen[seen.index(seen[-1]) + 1]),
        *(
            (
                synthetic.copying(17, 3, 5, scattered=scattered),
                lambda seen: [token for token in seen if 1 <= token <= 5][seen.count(6) - 1],
            )
            for scattered in (False, True)
        ),
        (synthetic.needle((1, 4, 11), 19, 5), lambda seen: seen[seen.index(11) + 1]),
    ],
)
def test_answers_of_a_task_follow_from_what_came_before(task, solve):
    batch = task.batch(37, 3, 5)
    equal = [(task.batch(37, *key).tokens == batch.tokens).all() for key in ((3, 5), (3, 6))]
    assert equal == [True, False]
    assert max(batch.tokens.max(), batch.targets.max()) < task.vocab_size
    for tokens, targets, mask in zip(batch.tokens, batch.targets, batch.loss_mask, strict=True):
        asked = np.flatnonzero(mask)
        assert len(asked) >= 2
        assert [targets[i] for i in asked] == [solve(tokens[: i + 1].tolist()) for i in asked]


COPY = synthetic.copying(6, 2, 3, scattered=False)


def test_a_small_model_learns_to_copy_through_a_curriculum():
    stages = [(COPY, 60, 32), (COPY, 60, 16)]
    trained = synthetic.train(synthetic.variant(f"{RECURRENCE} 8 x 8", 6), stages, "muon", 3e-2)
    assert trained.loss < 0.5 * math.log(3)
    assert synthetic.accuracy(trained, COPY, 64) > 0.7
