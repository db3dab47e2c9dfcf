"""Tokens and losses that are counted from step to step."""

import json
import math

import pytest

from simplernn_jax.config import TrainConfig
from simplernn_jax.errors import UserError
from simplernn_jax.training.progress import Progress, check_finite


def test_the_mean_loss_is_weighted_by_tokens_and_starts_anew():
    progress = Progress()
    progress.add(2.0, 30, skipped=False)
    progress.add(5.0, 10, skipped=False)
    assert progress.take_mean_loss() == pytest.approx((2.0 * 30 + 5.0 * 10) / 40)
    progress.add(1.5, 7, skipped=False)
    assert progress.take_mean_loss() == 1.5
    assert progress.tokens == 47


def test_a_skipped_update_counts_tokens_and_no_loss():
    progress = Progress()
    progress.add(math.nan, 30, skipped=True)
    assert math.isnan(progress.take_mean_loss())
    progress.add(math.inf, 30, skipped=True)
    progress.add(2.0, 5, skipped=False)
    assert progress.take_mean_loss() == 2.0
    assert progress.tokens == 65


def test_it_goes_on_from_a_checkpoint():
    progress = Progress()
    progress.add(0.1, 3, skipped=False)
    again = Progress.from_json(json.loads(json.dumps(progress.to_json())))
    for each in (progress, again):
        each.add(0.7, 11, skipped=False)
    assert again == progress
    assert again.take_mean_loss() == progress.take_mean_loss()


def test_a_checkpoint_that_did_not_count_tokens_leaves_them_unknown():
    progress = Progress.from_json(None)
    progress.add(2.0, 30, skipped=False)
    assert (progress.tokens, progress.take_mean_loss()) == (None, 2.0)
    assert Progress.from_json(progress.to_json()).tokens is None


@pytest.mark.parametrize(("limit", "where"), [(1, "in 1 step, up"), (3, "in 3 steps in a row, up")])
def test_as_many_skipped_updates_as_are_allowed_end_a_run(limit, where):
    config = TrainConfig(max_skipped_updates=limit, seed=5)
    check_finite(9, limit - 1, config)
    with pytest.raises(UserError, match=rf"{where} to step 9 \(batch 8 of seed 5\); .* of step "):
        check_finite(9, limit, config)
