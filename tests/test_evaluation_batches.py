import chex
import numpy as np
import pytest
from token_splits import BOS, PAD, contexts, document_of, make_split, predictable, unique_split

from simplernn_jax.data.evaluation_batches import evaluation_batches
from simplernn_jax.errors import UserError


@pytest.mark.parametrize("max_rows", [1, 2, 3, 100])
@pytest.mark.parametrize("batch_tokens", [1, 13, 64, 10_000])
def test_evaluation_scores_every_prediction_once(max_rows, batch_tokens):
    split = unique_split()
    pad = len(split.tokens)
    iterator, number = evaluation_batches(split, batch_tokens, max_rows, pad)
    batches = list(iterator)
    assert len(batches) == number
    rows, length = batches[0].tokens.shape
    assert rows <= max_rows
    assert rows * length <= max(batch_tokens, rows)
    assert len({batch.tokens.shape for batch in batches}) == 1
    made = np.concatenate([batch.tokens[batch.loss_mask] for batch in batches])
    np.testing.assert_array_equal(np.sort(made), predictable(split))
    for batch in batches:
        np.testing.assert_array_equal(
            batch.targets[batch.loss_mask], batch.tokens[batch.loss_mask] + 1
        )
        assert (batch.tokens[~batch.loss_mask] == pad).all()
        chex.assert_type([*batch[:4], batch.reset], [np.int32, np.int32, bool, np.int32, bool])


@pytest.mark.parametrize(("batch_tokens", "max_rows"), [(5, 1), (14, 2), (33, 7), (10_000, 3)])
def test_evaluation_sees_the_whole_document_and_nothing_else(batch_tokens, max_rows):
    split = unique_split()
    batches = list(evaluation_batches(split, batch_tokens, max_rows, len(split.tokens))[0])
    begins = split.document_starts[document_of(split, predictable(split))]
    expected = {
        int(position): tuple(range(begin, position + 1))
        for position, begin in zip(predictable(split), begins, strict=True)
    }
    assert contexts(batches) == expected


@pytest.mark.parametrize("divisible_by", [(4, 1), (1, 6), (8, 12)])
def test_rows_and_length_divide_among_devices_and_nothing_else_changes(divisible_by):
    split = unique_split()
    batches = list(
        evaluation_batches(split, 33, 7, len(split.tokens), divisible_by=divisible_by)[0]
    )
    rows, length = batches[0].tokens.shape
    assert (rows % divisible_by[0], length % divisible_by[1]) == (0, 0)
    made = np.concatenate([batch.tokens[batch.loss_mask] for batch in batches])
    np.testing.assert_array_equal(np.sort(made), predictable(split))
    expected = list(evaluation_batches(split, 33, 7, len(split.tokens))[0])
    assert contexts(batches) == contexts(expected)


def test_evaluation_of_one_document_is_one_row():
    split = make_split((1009,))
    iterator, number = evaluation_batches(split, 256, 16, PAD)
    batches = list(iterator)
    assert [batch.tokens.shape for batch in batches] == [(1, 256)] * number == [(1, 256)] * 4
    assert [bool(batch.reset[0]) for batch in batches] == [True, False, False, False]
    targets = np.concatenate([batch.targets[batch.loss_mask] for batch in batches])
    np.testing.assert_array_equal(targets, split.tokens[1:])


def test_a_long_document_does_not_leave_rows_idle():
    split = make_split((997, *(7 for _ in range(50))))
    batches = list(evaluation_batches(split, 64, 16, PAD)[0])
    scored = sum(int(batch.loss_mask.sum()) for batch in batches)
    assert scored > 0.7 * sum(batch.tokens.size for batch in batches)


@pytest.mark.parametrize("limit", [1, 2, 29, 97, 230])
def test_limited_evaluation_scores_so_many(limit):
    split = unique_split()
    first = list(evaluation_batches(split, 40, 3, len(split.tokens), limit)[0])
    again = list(evaluation_batches(split, 40, 3, len(split.tokens), limit)[0])
    chex.assert_trees_all_equal(first, again)
    seen = contexts(first)
    assert len(seen) == min(limit, split.num_predictions)
    whole = contexts(list(evaluation_batches(split, 40, 3, len(split.tokens))[0]))
    assert seen.items() <= whole.items()


def test_limited_evaluation_takes_from_many_documents():
    split = make_split((401,) * 20)
    batches = list(evaluation_batches(split, 64, 100, PAD, 803)[0])
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == 803
    assert sum(int((batch.tokens == BOS).sum()) for batch in batches) >= 8


def test_evaluation_of_nothing():
    split = make_split((17, 13), cut_front=18, cut_back=14)
    with pytest.raises(UserError, match="nothing to score: the train split has 2 tokens"):
        evaluation_batches(split, 64, 3, PAD)


@pytest.mark.parametrize("reset_every", [1, 5, 1000])
@pytest.mark.parametrize(("batch_tokens", "max_rows"), [(14, 2), (10_000, 3)])
def test_resets_cut_what_is_seen_and_nothing_else(batch_tokens, max_rows, reset_every):
    split = unique_split()
    arguments = (split, batch_tokens, max_rows, len(split.tokens))
    carried = list(evaluation_batches(*arguments)[0])
    reset = list(evaluation_batches(*arguments, reset_every=reset_every)[0])
    for ours, theirs in zip(reset, carried, strict=True):
        chex.assert_trees_all_equal(ours[:3], theirs[:3])
    whole = contexts(carried)
    within = {position: (len(seen) - 1) % reset_every + 1 for position, seen in whole.items()}
    assert contexts(reset) == {
        position: seen[-within[position] :] for position, seen in whole.items()
    }
