"""Which checkpoints are kept."""

import types

import pytest

from simplernn_jax.checkpoint.contents import Quality
from simplernn_jax.checkpoint.retention import KeepLastAndBest

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
        policy.add(step, None if loss is None else Quality(loss, 7))
    assert preserved(policy, LOSSES) == kept


def test_a_loss_over_other_tokens_is_not_the_best():
    policy = KeepLastAndBest(1, 1)
    for step, quality in {2: Quality(0.5, 7), 3: Quality(1.5, 11), 5: Quality(2.5, 11)}.items():
        policy.add(step, quality)
    policy.add(7, None)
    assert preserved(policy, (2, 3, 5, 7)) == [3, 7]


def preserved(policy, steps):
    checkpoints = [types.SimpleNamespace(step=step) for step in steps]
    stays = policy.should_preserve(checkpoints, context=None)
    return [step for step, stay in zip(steps, stays, strict=True) if stay]
