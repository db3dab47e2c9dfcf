"""Batches of evaluation: every prediction once, and the tokens that each sees."""

import dataclasses
import itertools

import chex
import numpy as np
import pytest
from small_data import BOS, PAD, contexts, document_of, make_split, predictable, unique_split

from simplernn_jax.data.evaluation_batches import Contexts, context_batches, evaluation_batches
from simplernn_jax.data.token_split import ConcatenatedArray
from simplernn_jax.errors import UserError

SPLIT = unique_split()


def carried(batch_tokens, max_batch_size, *args, split=SPLIT, **settings):
    """Batches with a carried state, after checks that hold for all of them."""
    pad = len(split.tokens) if split.content_hash == SPLIT.content_hash else PAD
    return checked(
        split, evaluation_batches(split, batch_tokens, max_batch_size, pad, *args, **settings)
    )


def overlapping(length, stride, batch_tokens=64, max_batch_size=10_000, *, split=SPLIT, **settings):
    """Batches of overlapping contexts, checked too."""
    pad = len(split.tokens)
    sizes = Contexts(length, stride), batch_tokens, max_batch_size
    batches = checked(split, context_batches(split, *sizes, pad, **settings))
    assert all(batch.reset.all() for batch in batches)
    return batches


def checked(split, iterator):
    batches = list(iterator)
    assert len({batch.tokens.shape for batch in batches}) == 1
    for batch in batches:
        chex.assert_type([*batch[:4], batch.reset], [np.int32, np.int32, bool, np.int32, bool])
        if split is SPLIT:
            mask = batch.loss_mask
            np.testing.assert_array_equal(batch.targets[mask], batch.tokens[mask] + 1)
    return batches


def scored(batches):
    return np.concatenate([batch.tokens[batch.loss_mask] for batch in batches])


@pytest.mark.parametrize("max_batch_size", [1, 2, 3, 100])
@pytest.mark.parametrize("batch_tokens", [1, 13, 64, 10_000])
def test_evaluation_scores_every_prediction_once(max_batch_size, batch_tokens):
    batches = carried(batch_tokens, max_batch_size)
    batch_size, length = batches[0].tokens.shape
    assert batch_size <= max_batch_size
    assert batch_size * length <= max(batch_tokens, batch_size)
    np.testing.assert_array_equal(np.sort(scored(batches)), predictable(SPLIT))
    for batch in batches:
        assert (batch.tokens[~batch.loss_mask] == len(SPLIT.tokens)).all()


@pytest.mark.parametrize(
    ("batch_tokens", "max_batch_size"), [(5, 1), (14, 2), (33, 7), (10_000, 3)]
)
def test_evaluation_sees_the_whole_document_and_nothing_else(batch_tokens, max_batch_size):
    begins = SPLIT.document_starts[document_of(SPLIT, predictable(SPLIT))]
    assert contexts(carried(batch_tokens, max_batch_size)) == {
        int(position): tuple(range(begin, position + 1))
        for position, begin in zip(predictable(SPLIT), begins, strict=True)
    }


@pytest.mark.parametrize("divisible_by", [(4, 1), (1, 6), (8, 12)])
@pytest.mark.parametrize(("make", "args"), [(carried, (33, 7)), (overlapping, (11, 4))])
def test_sequences_and_length_divide_among_devices(make, args, divisible_by):
    batches = make(*args, divisible_by=divisible_by)
    batch_size, length = batches[0].tokens.shape
    assert (batch_size % divisible_by[0], length % divisible_by[1]) == (0, 0)
    np.testing.assert_array_equal(np.sort(scored(batches)), predictable(SPLIT))
    assert contexts(batches) == contexts(make(*args))


def test_a_long_document_does_not_leave_sequences_idle():
    batches = carried(64, 16, split=make_split((997, *(7 for _ in range(50)))))
    assert len(scored(batches)) > 0.7 * sum(batch.tokens.size for batch in batches)


@pytest.mark.parametrize("limit", [1, 13, 61, 1000])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_limit_counts_targets_and_not_the_prompts_before_them(limit, parts):
    is_target = np.zeros(len(SPLIT.tokens), bool)
    for start, end in itertools.pairwise([*SPLIT.document_starts, len(SPLIT.tokens)]):
        is_target[start + (end - start) // 2 : end] = True
    is_target[SPLIT.document_starts] = False
    targets = ConcatenatedArray(np.array_split(is_target, parts))
    tokens = ConcatenatedArray(np.array_split(SPLIT.tokens, parts))
    split = dataclasses.replace(SPLIT, tokens=tokens, targets=targets)
    whole = contexts(carried(40, 3, split=split))
    limited = carried(40, 3, limit, split=split)
    chex.assert_trees_all_equal(limited, carried(40, 3, limit, split=split))
    seen = contexts(limited)
    assert len(whole) == split.num_predictions < SPLIT.num_predictions / 1.5
    assert len(seen) == min(limit, split.num_predictions)
    assert seen.items() <= whole.items()
    assert contexts(overlapping(11, 5, limit_tokens=limit, split=split)).keys() == seen.keys()


def test_limited_evaluation_takes_from_many_documents():
    batches = carried(64, 100, 803, split=make_split((401,) * 20))
    assert len(scored(batches)) == 803
    assert sum(int((batch.tokens == BOS).sum()) for batch in batches) >= 8


def test_evaluation_of_nothing():
    split = make_split((17, 13), cut_front=18, cut_back=14)
    message = "nothing to score: the train split has 2 tokens"
    with pytest.raises(UserError, match=message):
        evaluation_batches(split, 64, 3, PAD)
    with pytest.raises(UserError, match=message):
        context_batches(split, Contexts(3, 2), 64, 3, PAD)


@pytest.mark.parametrize("reset_every", [1, 5, 1000])
@pytest.mark.parametrize(("batch_tokens", "max_batch_size"), [(14, 2), (10_000, 3)])
def test_resets_shorten_the_context_and_change_nothing_else(
    batch_tokens, max_batch_size, reset_every
):
    whole = carried(batch_tokens, max_batch_size)
    reset = carried(batch_tokens, max_batch_size, reset_every=reset_every)
    for ours, theirs in zip(reset, whole, strict=True):
        chex.assert_trees_all_equal(ours[:3], theirs[:3])
    assert contexts(reset) == {
        position: seen[-((len(seen) - 1) % reset_every + 1) :]
        for position, seen in contexts(whole).items()
    }


@pytest.mark.parametrize("batch_tokens", [1, 64, 10_000])
@pytest.mark.parametrize(("length", "stride"), [(1, 1), (11, 11), (11, 4), (11, 1), (1000, 3)])
def test_every_prediction_is_scored_once_in_its_context(length, stride, batch_tokens):
    batches = overlapping(length, stride, batch_tokens)
    np.testing.assert_array_equal(np.sort(scored(batches)), predictable(SPLIT))
    seen = contexts(batches)
    begins = SPLIT.document_starts[document_of(SPLIT, predictable(SPLIT))]
    for position, begin in zip(predictable(SPLIT), begins, strict=True):
        within = position - begin
        first = max(0, -(-(within - length + 1) // stride)) * stride
        assert seen[position] == tuple(range(begin + first, position + 1))
        assert min(within + 1, length - stride + 1) <= len(seen[position]) <= length


def test_contexts_of_a_batch_are_bounded():
    many, few = overlapping(3, 2, 64), overlapping(3, 2, 64, 5)
    assert len(many[0].tokens) == 21
    assert len(few[0].tokens) == 5
    assert contexts(few) == contexts(many)


@pytest.mark.parametrize(("length", "stride"), [(3, 4), (3, 0), (0, 0)])
def test_contexts_that_would_leave_tokens_out_are_rejected(length, stride):
    with pytest.raises(UserError, match=f"contexts of {length} tokens, one every {stride}: "):
        Contexts(length, stride)
