"""Evaluation by overlapping windows: every prediction once, and what each has read."""

import chex
import numpy as np
import pytest
from token_splits import PAD, contexts, document_of, make_split, predictable, unique_split

from simplernn_jax.data.evaluation_batches import evaluation_batches
from simplernn_jax.data.window_batches import Windows, window_batches
from simplernn_jax.errors import UserError


def batches_of(length, stride, batch_tokens=64, limit_tokens=0, divisible_by=(1, 1)):
    split = unique_split()
    iterator, number = window_batches(
        split, Windows(length, stride), batch_tokens, len(split.tokens), limit_tokens, divisible_by
    )
    batches = list(iterator)
    assert len(batches) == number
    return split, batches


@pytest.mark.parametrize("batch_tokens", [1, 64, 10_000])
@pytest.mark.parametrize(("length", "stride"), [(1, 1), (11, 11), (11, 4), (11, 1), (1000, 3)])
def test_every_prediction_is_scored_once_from_its_window(length, stride, batch_tokens):
    split, batches = batches_of(length, stride, batch_tokens)
    assert len({batch.tokens.shape for batch in batches}) == 1
    made = np.concatenate([batch.tokens[batch.loss_mask] for batch in batches])
    np.testing.assert_array_equal(np.sort(made), predictable(split))
    seen = contexts(batches)
    for position, begin in zip(
        predictable(split),
        split.document_starts[document_of(split, predictable(split))],
        strict=True,
    ):
        within = position - begin
        first = max(0, -(-(within - length + 1) // stride)) * stride
        assert seen[position] == tuple(range(begin + first, position + 1))
        assert min(within + 1, length - stride + 1) <= len(seen[position]) <= length
    for batch in batches:
        mask = batch.loss_mask
        np.testing.assert_array_equal(batch.targets[mask], batch.tokens[mask] + 1)
        assert batch.reset.all()
        chex.assert_type([*batch[:4], batch.reset], [np.int32, np.int32, bool, np.int32, bool])


def test_a_stride_of_a_window_is_a_reset_after_each():
    split, batches = batches_of(7, 7)
    reset = evaluation_batches(split, 64, 3, len(split.tokens), reset_every=7)[0]
    assert contexts(batches) == contexts(list(reset))


def test_a_limit_scores_the_same_predictions_as_with_a_carried_state():
    split, batches = batches_of(11, 5, limit_tokens=97)
    carried = evaluation_batches(split, 64, 3, len(split.tokens), 97)[0]
    assert contexts(batches).keys() == contexts(list(carried)).keys()


@pytest.mark.parametrize("divisible_by", [(4, 1), (1, 6), (8, 12)])
def test_rows_and_length_divide_among_devices_and_nothing_else_changes(divisible_by):
    _, batches = batches_of(11, 4, divisible_by=divisible_by)
    rows, length = batches[0].tokens.shape
    assert (rows % divisible_by[0], length % divisible_by[1]) == (0, 0)
    assert contexts(batches) == contexts(batches_of(11, 4)[1])


@pytest.mark.parametrize(("length", "stride"), [(3, 4), (3, 0), (0, 0)])
def test_windows_that_would_leave_tokens_out_are_refused(length, stride):
    with pytest.raises(UserError, match=f"windows of {length} tokens, one every {stride}: "):
        batches_of(length, stride)


def test_windows_of_nothing():
    split = make_split((17, 13), cut_front=18, cut_back=14)
    with pytest.raises(UserError, match="nothing to score: the train split has 2 tokens"):
        window_batches(split, Windows(3, 2), 64, PAD)
