import itertools
import json

import chex
import numpy as np
import pytest
from small_data import BOS, EOS, PAD, contexts, document_of, make_split, predictable, unique_split

from simplernn_jax.config import DataConfig
from simplernn_jax.data.batches import Batch, BatchSource, make_batches, steps_per_epoch
from simplernn_jax.errors import UserError

MODES = ("window", "stream", "document")


def data_config(mode, **changes):
    return DataConfig(**{"mode": mode, "batch_size": 3, "sequence_length": 11, **changes})


def epoch(source, steps, number=0):
    """All batches of an epoch."""
    return [source[number * steps + step] for step in range(steps)]


def open_source(split, config, seed=0, pad_id=PAD):
    return BatchSource(split, config, seed, pad_id), steps_per_epoch(split, config)


def predictions(batches):
    """Tokens whose next one is predicted."""
    return np.concatenate([batch.tokens[batch.loss_mask] for batch in batches])


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def check_sequences(split, batch):
    """Check the invariants of every mode, for a split whose tokens are positions."""
    assert [leaf.shape for leaf in batch] == [(3, 11)] * 4 + [(3,)]
    assert [leaf.dtype for leaf in batch] == [np.int32, np.int32, bool, np.int32, bool]
    mask = batch.loss_mask
    num_tokens = len(split.tokens)
    np.testing.assert_array_equal(batch.targets[mask], batch.tokens[mask] + 1)
    np.testing.assert_array_equal(
        document_of(split, batch.targets[mask]), document_of(split, batch.tokens[mask])
    )
    padding = batch.tokens == num_tokens
    assert not mask[padding].any()
    np.testing.assert_array_equal(
        mask[~padding], np.isin(batch.tokens, predictable(split))[~padding]
    )
    changes = batch.segment_ids[:, 1:] != batch.segment_ids[:, :-1]
    begins = np.isin(batch.tokens, split.document_starts) & ~padding
    begins |= padding & ~np.roll(padding, 1, axis=1)
    np.testing.assert_array_equal(changes, begins[:, 1:])


@pytest.mark.parametrize("mode", MODES)
def test_sequences_respect_documents(mode):
    split = unique_split()
    source = BatchSource(split, data_config(mode), 0, len(split.tokens))
    for index in range(3 * steps_per_epoch(split, data_config(mode))):
        check_sequences(split, source[index])


@pytest.mark.parametrize("mode", MODES)
def test_item_follows_from_seed_and_index(mode):
    split, config = make_split(), data_config(mode, reset_probability=0.3)
    source, again = BatchSource(split, config, 7, PAD), BatchSource(split, config, 7, PAD)
    later = source[40]
    for index in (0, 1, 29, 40):
        chex.assert_trees_all_equal(source[index], again[index])
    chex.assert_trees_all_equal(later, again[40])
    other = BatchSource(split, config, 8, PAD)
    assert not np.array_equal(other[40].tokens, later.tokens)
    assert len(source) > 1e12


def test_draws_are_the_same_on_every_machine():
    split = unique_split()
    first_tokens = [
        BatchSource(split, data_config(mode, reset_probability=0.5), 3, PAD)[20].tokens[:, 0]
        for mode in MODES
    ]
    reset = BatchSource(split, data_config("stream", reset_probability=0.5), 3, PAD)[20].reset
    assert np.stack(first_tokens).tolist() == [[47, 135, 179], [14, 95, 177], [176, 179, 0]]
    assert reset.tolist() == [False, False, True]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("taken", [0, 17])
def test_resume_is_exact(mode, taken):
    split, config = make_split(), data_config(mode, reset_probability=0.3)
    whole = take(make_batches(split, config, 2, PAD), 40)
    stopped = make_batches(split, config, 2, PAD)
    chex.assert_trees_all_equal(take(stopped, taken), whole[:taken])
    state = json.loads(json.dumps(stopped.get_state()))
    resumed = make_batches(split, config, 2, PAD)
    take(resumed, 5)
    resumed.set_state(state)
    chex.assert_trees_all_equal(take(resumed, 40 - taken), whole[taken:])
    assert resumed.get_state() == {"next_index": 40}


def test_examples_start_everywhere():
    split = unique_split()
    source = BatchSource(split, data_config("window", stride=0), 0, PAD)
    batches = [source[index] for index in range(700)]
    assert all(batch.reset.all() for batch in batches)
    starts = np.concatenate([batch.tokens[:, 0] for batch in batches])
    assert set(starts.tolist()) == set(range(len(split.tokens)))


@pytest.mark.parametrize(("stride", "batch_size"), [(None, 3), (11, 100), (4, 7), (1, 3)])
def test_every_window_is_taken_once_an_epoch(stride, batch_size):
    split = unique_split()
    config = data_config("window", stride=stride, batch_size=batch_size)
    source, steps = open_source(split, config)
    stride = stride or config.sequence_length
    count = -(-len(split.tokens) // stride)
    assert steps == -(-count // batch_size)
    windows = [Batch(*each) for i in range(3 * steps) for each in zip(*source[i], strict=True)]
    assert all(window.reset for window in windows)
    orders = []
    for taken in (windows[:count], windows[count : 2 * count]):
        begins = np.array([window.tokens[0] for window in taken])
        orders.append(begins.tolist())
        assert len(set(orders[-1])) == count
        after = np.diff(np.sort(begins), append=begins.min() + len(split.tokens))
        assert sorted(after)[1:] == [stride] * (count - 1)  # the ring may end with a shorter one
        made = predictions(taken)
        np.testing.assert_array_equal(np.unique(made), predictable(split))
    assert orders[0] != orders[1]


def test_stream_continues_from_batch_to_batch():
    split, config = unique_split(), data_config("stream")
    source, steps = open_source(split, config)
    begins = {int(source[number * steps].tokens[0, 0]) for number in range(20)}
    assert len(begins) > 10  # each epoch starts at another position
    for number in range(3):
        batches = epoch(source, steps, number)
        for step, batch in enumerate(batches):
            begins = np.isin(batch.tokens[:, 0], split.document_starts)
            np.testing.assert_array_equal(batch.reset, begins | (step == 0))
            if step:
                np.testing.assert_array_equal(batches[step - 1].targets[:, -1], batch.tokens[:, 0])


@pytest.mark.parametrize(("batch_size", "sequence_length"), [(3, 11), (7, 5), (1, 245), (1, 2)])
def test_stream_epoch_makes_every_prediction(batch_size, sequence_length):
    split = unique_split()
    config = data_config("stream", batch_size=batch_size, sequence_length=sequence_length)
    source, steps = open_source(split, config, 1)
    made = predictions(epoch(source, steps))
    positions, times = np.unique(made, return_counts=True)
    np.testing.assert_array_equal(positions, predictable(split))
    assert len(made) - len(positions) < batch_size * sequence_length
    assert times.max() <= 2


def test_stream_resets_at_the_given_rate():
    split = make_split((10_007,))
    config = data_config("stream", batch_size=5, sequence_length=7, reset_probability=0.25)
    source, steps = open_source(split, config)
    resets = np.stack([source[step].reset for step in range(1, steps)])
    assert abs(resets.mean() - 0.25) < 0.04
    assert 0 < resets.all(axis=1).mean() < 0.02  # sequences are drawn independently


def test_document_epoch_makes_every_prediction_once():
    split, config = unique_split(), data_config("document")
    source, steps = open_source(split, config, 0, len(split.tokens))
    orders = []
    for number in range(3):
        batches = epoch(source, steps, number)
        assert all(batch.reset.all() for batch in batches)
        used = batches[-1].loss_mask.any(axis=1)  # sequences of padding fill the last batch
        assert (batches[-1].tokens[~used] == len(split.tokens)).all()
        made = predictions(batches)
        np.testing.assert_array_equal(np.sort(made), predictable(split))
        orders.append(made.tolist())
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("mode", MODES)
def test_documents_cut_by_a_position_split(mode):
    split = make_split((17, 13), cut_front=18, cut_back=14)
    assert split.tokens.tolist() == [EOS, BOS]
    config = data_config(mode, batch_size=1, sequence_length=1)
    with pytest.raises(UserError, match="nothing to learn from: the train split has 2 tokens"):
        steps_per_epoch(split, config)
    split = make_split((17, 13), cut_front=5, cut_back=3)
    source, steps = open_source(split, config)
    batches = epoch(source, steps)
    if mode != "window":
        assert sum(int(batch.loss_mask.sum()) for batch in batches) == 13 + 11


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("window", r"split has 12 tokens, and data.sequence_length needs 14; use more text"),
        ("stream", r"data.batch_size \* data.sequence_length needs 39; use"),
    ],
)
def test_too_short_a_corpus(mode, message):
    config = data_config(mode, sequence_length=13)
    with pytest.raises(UserError, match=message):
        make_batches(make_split((10,)), config, 0, PAD)


@pytest.mark.parametrize("mode", MODES)
def test_smallest_possible_corpus(mode):
    split = make_split((9,))
    batch_size = 1 if mode == "stream" else 3
    config = data_config(mode, batch_size=batch_size, sequence_length=10)
    assert steps_per_epoch(split, config) == (2 if mode == "stream" else 1)
    assert BatchSource(split, config, 0, PAD)[1].loss_mask.any()
    assert steps_per_epoch(make_split((0,)), data_config("document")) == 1


def test_stream_state_sees_its_document_and_nothing_else():
    split, config = unique_split(), data_config("stream")
    source, steps = open_source(split, config)
    for position, context in contexts(epoch(source, steps)).items():
        begin = max(context[0], int(split.document_starts[document_of(split, position)]))
        assert context == tuple(range(begin, position + 1))
