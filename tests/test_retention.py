"""Which checkpoints are kept."""

import types

import pytest

from simplernn_jax.training.retention import KeepLastAndBest

LOSSES = {2: 1.5, 3: None, 5: 0.5, 7: 2.5, 11: 0.75, 13: None, 17: 3.5}


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "kept"),
    [
        (2, 0, [13, 17]),
        (2, 1, [5, 13, 17]),
        (3, 2, [5, 11, 13, 17]),
        (2, 9, [2, 5, 7, 11, 13, 17]),
        (9, 0, list(LOSSES)),
    ],
)
def test_keeps_the_newest_and_the_best(keep_last, keep_best, kept):
    policy = KeepLastAndBest(keep_last, keep_best)
    for step, loss in LOSSES.items():
        policy.add(step, loss)
    checkpoints = [types.SimpleNamespace(step=step) for step in LOSSES]
    preserved = policy.should_preserve(checkpoints, context=None)
    assert [step for step, stays in zip(LOSSES, preserved, strict=True) if stays] == kept
