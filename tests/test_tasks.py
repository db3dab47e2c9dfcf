"""Synthetic tasks: every answer follows from the tokens before its query."""

import re

import numpy as np
import pytest

from simplernn_jax.data.tasks import BLANK, AssociativeRecall, Copying, Needle

RECALL = AssociativeRecall(pairs=(2, 5), sequence_length=17, symbols=7)
COPY = Copying(count=3, symbols=5, blanks=11, scattered=False)
SCATTERED = Copying(count=3, symbols=5, blanks=11, scattered=True)
NEEDLE = Needle(distances=(1, 4, 11), sequence_length=19, symbols=5)
TASKS = {"recall": RECALL, "copy": COPY, "scattered": SCATTERED, "needle": NEEDLE}
BATCH = 37


def answer_recall(seen):
    """Keys are in [1, 7], values in [8, 14]."""
    *before, key = seen
    return before[before.index(key) + 1]


def answer_copy(seen):
    symbols = [token for token in seen if 1 <= token <= 5]
    return symbols[seen.count(6) - 1]


def answer_needle(seen):
    assert seen[-1] == 12
    return seen[seen.index(11) + 1]


SOLVERS = {
    "recall": answer_recall,
    "copy": answer_copy,
    "scattered": answer_copy,
    "needle": answer_needle,
}


@pytest.mark.parametrize("name", TASKS)
def test_answers_follow_from_what_came_before(name):
    batch = TASKS[name].batch(BATCH, seed=3, index=5)
    for tokens, targets, mask in zip(batch.tokens, batch.targets, batch.loss_mask, strict=True):
        asked = np.flatnonzero(mask)
        assert len(asked) >= 2
        for place in asked:
            assert targets[place] == SOLVERS[name](tokens[: place + 1].tolist())
        assert (targets[~mask] == BLANK).all()


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_has_the_shapes_of_training(name):
    task = TASKS[name]
    batch = task.batch(BATCH, seed=3, index=5)
    shape = (BATCH, task.length)
    for part, dtype in zip(batch[:4], (np.int32, np.int32, bool, np.int32), strict=True):
        assert part.shape == shape
        assert part.dtype == dtype
    assert batch.reset.all()
    assert not batch.segment_ids.any()
    for ids in (batch.tokens, batch.targets):
        assert ids.min() >= 0
        assert ids.max() < task.vocab_size


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_follows_from_seed_and_index(name):
    task = TASKS[name]
    once, again, later, other = (
        task.batch(BATCH, *key).tokens for key in ((3, 5), (3, 5), (3, 6), (4, 5))
    )
    np.testing.assert_array_equal(once, again)
    assert (once != later).any()
    assert (once != other).any()
    assert len(np.unique(once, axis=0)) > BATCH / 2


def test_recall_queries_each_key_once_and_keys_and_values_differ():
    batch = RECALL.batch(BATCH, 0, 0)
    counts = batch.loss_mask.sum(axis=1)
    assert set(counts) == {2, 5}
    for tokens, targets, mask, count in zip(
        batch.tokens, batch.targets, batch.loss_mask, counts, strict=True
    ):
        keys, values = tokens[0 : 2 * count : 2], tokens[1 : 2 * count : 2]
        assert len(set(keys)) == len(set(values)) == count
        assert set(tokens[mask]) == set(keys)
        assert set(targets[mask]) == set(values)
        assert not mask[: 2 * count].any()
        assert (tokens[2 * count :][~mask[2 * count :]] == BLANK).all()


def test_copying_has_its_symbols_first_or_anywhere():
    first = COPY.batch(BATCH, 0, 0).tokens
    assert (first[:, :3] != BLANK).all()
    assert (first[:, 3:14] == BLANK).all()
    anywhere = SCATTERED.batch(BATCH, 0, 0).tokens[:, :14]
    assert ((anywhere != BLANK).sum(axis=1) == 3).all()
    assert (anywhere != BLANK).any(axis=0).all()


def test_a_needle_is_queried_at_its_distances_and_starts_anywhere():
    batch = NEEDLE.batch(BATCH, 0, 0)
    begins = np.argmax(batch.tokens == 11, axis=1)
    for mask, begin in zip(batch.loss_mask, begins, strict=True):
        assert np.flatnonzero(mask).tolist() == [begin + 2, begin + 5, begin + 12]
    assert set(begins) == set(range(7))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AssociativeRecall(pairs=(4,), sequence_length=11), "self.pairs=(4,) do not fit"),
        (lambda: AssociativeRecall(pairs=(9,), sequence_length=99, symbols=8), "self.symbols=8"),
        (
            lambda: AssociativeRecall(pairs=(0, 3), sequence_length=99),
            "self.pairs=(0, 3) do not fit",
        ),
        (lambda: Needle(distances=(10,), sequence_length=11), "self.sequence_length=11"),
        (lambda: Needle(distances=(0, 3), sequence_length=11), "the least is 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
