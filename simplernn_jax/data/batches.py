"""Batches of training: random examples, carried streams or padded documents, also of mixtures.

`BatchSource` is random access and its item *i is* batch *i*, a pure function of the split, the
configuration, the seed and *i*. The position of a run in its data is therefore one integer, and
resuming is exact in every mode.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from absl import flags

from simplernn_jax.config import DataConfig
from simplernn_jax.data.token_split import TokenSplit
from simplernn_jax.errors import UserError, counted

if TYPE_CHECKING:
    import grain

_ENDLESS = 2**48
"""Length of a source, more batches than any run takes."""

_EXAMPLES, _ROTATION, _RESETS, _ORDER, _SOURCES = range(5)
"""Purposes of random draws; each has its own stream of the seed."""


class Batch(NamedTuple):
    """Input of one optimizer step or one evaluation step; numpy arrays.

    In a run of several processes, each has its own sequences of the batch.

    The carried state of a sequence is reset before the batch where `reset` is True, and within it
    where `segment_ids` change; the incoming state belongs to the first segment.
    """

    tokens: np.ndarray
    """int32 [B, T], the inputs."""
    targets: np.ndarray
    """int32 [B, T], the token after each input."""
    loss_mask: np.ndarray
    """bool [B, T], False where the target belongs to another document, is not a target of the loss
    (`TokenSplit.targets`), and on padding."""
    segment_ids: np.ndarray
    """int32 [B, T], a new id from the first token of each document, and for padding."""
    reset: np.ndarray
    """bool [B]."""


def steps_per_epoch(split: TokenSplit, data_config: DataConfig) -> int:
    """Number of batches of one pass over `split`, or of random examples with as many tokens.

    Raises:
      UserError: the split is too short for one example, or for one sequence of each stream.
    """
    batch_size, length = data_config.batch_size, data_config.sequence_length
    num_tokens = len(split.tokens)
    if split.num_predictions == 0:
        raise UserError(
            f"nothing to learn from: the {split.name} split has {counted(num_tokens, 'token')} and "
            "none of them follows another in its document; use more text with config.data.source"
        )
    if data_config.mode == "document":
        return divide_up(int(_pieces_per_document(split, length).sum()), batch_size)
    is_stream = data_config.mode == "stream"
    needed = batch_size * length if is_stream else length + 1
    if num_tokens < needed:
        fields = "data.batch_size * data.sequence_length" if is_stream else "data.sequence_length"
        raise UserError(
            f"too little text: the {split.name} split has {counted(num_tokens, 'token')}, and "
            f"{fields} needs {needed}; use more text or smaller values"
        )
    if is_stream:
        return divide_up(divide_up(num_tokens, batch_size), length)
    if stride := _stride(split, data_config):
        return divide_up(divide_up(num_tokens, stride), batch_size)
    return divide_up(num_tokens, batch_size * length)


def _stride(split: TokenSplit, data_config: DataConfig) -> int:
    """Return the tokens from one window to the next, 0 for windows at random positions."""
    if data_config.stride is not None:
        return data_config.stride
    return 0 if len(split.parts or ()) > 1 else data_config.sequence_length


class BatchSource:
    """Random-access source whose item ``i`` is the `Batch` of optimizer step ``i``.

    ``window``: B examples of T tokens; `reset` everywhere. One begins every `stride` tokens of the
    ring of documents, from a random position in each epoch, and an epoch has all of them once, in a
    random order; the next epoch begins within a batch. With a stride of 0 they begin anywhere.

    ``stream``: the documents form a ring, rotated by a random amount each epoch and cut into B
    sequences of equal length (within one token). Batch j of an epoch holds tokens j T to (j+1) T
    of each. The last batch continues into the next sequence rather than being cut short: every
    prediction is made at least once an epoch, fewer than T of a sequence twice, and no step learns
    from a handful of tokens.

    ``document``: each document in consecutive pieces of at most T predictions, in a random order
    each epoch and each from a zero state, padded with `pad_id`; sequences of padding fill the last
    batch. Every prediction is made exactly once an epoch.

    Of a mixture, the source of each random window is drawn with the probabilities of the mixture.
    Otherwise each source has a fixed share of the sequences (by the largest remainder), which pass
    through it as if it were alone, in separate epochs.

    With `sequences`, an item has these sequences of the batch only, bit for bit, and no other is
    read: each of several processes makes its own part.

    Raises:
      UserError: a source is too short (`steps_per_epoch`), or has a weight but no sequence.
    """

    def __init__(
        self,
        split: TokenSplit,
        data_config: DataConfig,
        seed: int,
        pad_id: int,
        sequences: slice = slice(None),
    ):
        self._seed = seed
        self._batch_size = data_config.batch_size
        self._local = np.arange(self._batch_size)[sequences]
        weighted = zip(split.parts or (split,), split.weights or (1.0,), strict=True)
        used = [(part, weight) for part, weight in weighted if weight]
        self._until = np.cumsum([weight for _, weight in used])[:-1]
        data_config = dataclasses.replace(data_config, stride=_stride(split, data_config))
        self._is_drawn = data_config.mode == "window" and not data_config.stride
        counts = np.full(len(used), self._batch_size)
        self._first = np.zeros_like(counts)
        """First sequence of each source, unless they are drawn."""
        if not self._is_drawn:
            counts = _shares(used, self._batch_size)
            self._first = np.cumsum(counts) - counts
        self._sources = [
            _SourceBatches(part, dataclasses.replace(data_config, batch_size=int(n)), seed, pad_id)
            for (part, _), n in zip(used, counts, strict=True)
        ]

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: Any) -> Batch:
        if len(self._sources) == 1:
            return self._sources[0].take(int(index), self._local)
        if self._is_drawn:
            draws = _random_draws(self._seed, _SOURCES, int(index)).random(self._batch_size)
            chosen = np.searchsorted(self._until, draws[self._local], side="right")
        else:
            chosen = np.searchsorted(self._first, self._local, side="right") - 1
        batches = [
            self._sources[n].take(int(index), self._local[chosen == n] - self._first[n])
            for n in np.unique(chosen)
        ]
        place = np.argsort(np.argsort(chosen, kind="stable"))
        return Batch(*(np.concatenate(arrays)[place] for arrays in zip(*batches, strict=True)))


class _SourceBatches:
    """Sequences of one source in each batch, by `BatchSource`."""

    def __init__(self, split: TokenSplit, data_config: DataConfig, seed: int, pad_id: int) -> None:
        self._steps_per_epoch = steps_per_epoch(split, data_config)
        self._config = data_config
        self._batch_size, self._length = data_config.batch_size, data_config.sequence_length
        self._seed = seed
        self._pad_id = pad_id
        self._split = split
        self._tokens = np.asarray(split.tokens)
        self._targets = None if split.targets is None else np.asarray(split.targets)
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)
        if self._config.mode == "document":
            per_document = _pieces_per_document(split, self._length)
            self._pieces_until = np.cumsum(per_document)
            self._pieces_before = self._pieces_until - per_document
            self._document_ends = document_ends(split)
            self._pieces = int(self._pieces_until[-1])
        else:
            if self._config.stride:
                self._pieces = divide_up(len(self._tokens), self._config.stride)
            # A sequence may continue from the end of the ring into its beginning, once.
            starts = split.document_starts
            early = starts[starts <= self._length]
            self._boundaries = np.concatenate([starts, early + len(self._tokens)])

    def take(self, index: int, sequences: np.ndarray) -> Batch:
        """Return these sequences of batch `index`."""
        if self._config.mode == "document":
            return self._document_batch(index, sequences)
        if self._config.mode == "stream":
            return self._stream_batch(index, sequences)
        batch = self._ring_batch(self._example_starts(index)[sequences])
        return batch._replace(reset=np.ones_like(batch.reset))

    def _example_starts(self, index: int) -> np.ndarray:
        num_tokens = len(self._tokens)
        if not self._config.stride:
            draws = _random_draws(self._seed, _EXAMPLES, index)
            return draws.integers(0, num_tokens, self._batch_size)
        starts = np.empty(self._batch_size, np.int64)
        epochs, places = divmod(index * self._batch_size + np.arange(len(starts)), self._pieces)
        for epoch in np.unique(epochs):
            turn = _random_draws(self._seed, _ROTATION, epoch).integers(0, num_tokens)
            nth = self._order(epoch)[places[epochs == epoch]]
            starts[epochs == epoch] = (turn + nth * self._config.stride) % num_tokens
        return starts

    def _stream_batch(self, index: int, sequences: np.ndarray) -> Batch:
        epoch, step = divmod(index, self._steps_per_epoch)
        num_tokens = len(self._tokens)
        turn = _random_draws(self._seed, _ROTATION, epoch).integers(0, num_tokens)
        starts = np.arange(self._batch_size)[sequences] * num_tokens // self._batch_size
        starts = (turn + starts + step * self._length) % num_tokens
        batch = self._ring_batch(starts)
        reset = batch.reset | (step == 0)
        if self._config.reset_probability:
            draws = _random_draws(self._seed, _RESETS, index).random(self._batch_size)
            reset |= draws[sequences] < self._config.reset_probability
        return batch._replace(reset=reset)

    def _ring_batch(self, starts: np.ndarray) -> Batch:
        """Return the batch from positions `starts` [B], reset where a document begins there."""
        positions = starts[:, None] + np.arange(self._length + 1)
        tokens = self._tokens.take(positions, mode="wrap")
        first = np.searchsorted(self._boundaries, starts)
        counts = np.searchsorted(self._boundaries, starts + self._length, side="right") - first
        sequence = np.repeat(np.arange(len(starts)), counts)
        nth = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)
        begins = np.zeros(positions.shape, bool)
        begins[sequence, self._boundaries[first[sequence] + nth] - starts[sequence]] = True
        loss_mask = ~begins[:, 1:]
        if self._targets is not None:
            loss_mask &= self._targets.take(positions[:, 1:], mode="wrap")
        return Batch(
            tokens=tokens[:, :-1].astype(np.int32),
            targets=tokens[:, 1:].astype(np.int32),
            loss_mask=loss_mask,
            segment_ids=np.cumsum(begins[:, :-1], axis=1, dtype=np.int32),
            reset=begins[:, 0],
        )

    def _draw_order(self, epoch: int) -> np.ndarray:
        return _random_draws(self._seed, _ORDER, epoch).permutation(self._pieces)

    def _document_batch(self, index: int, sequences: np.ndarray) -> Batch:
        epoch, step = divmod(index, self._steps_per_epoch)
        pieces = self._order(epoch)[step * self._batch_size : (step + 1) * self._batch_size]
        document = np.searchsorted(self._pieces_until, pieces, side="right")
        nth = pieces - self._pieces_before[document]
        starts = self._split.document_starts[document] + nth * self._length
        counts = np.minimum(self._length, self._document_ends[document] - 1 - starts)
        padding = np.zeros(self._batch_size - len(pieces), np.int64)
        starts = np.append(starts, padding)[sequences]
        counts = np.append(counts, padding)[sequences]
        along = np.arange(self._length)
        is_real = along < counts[:, None]
        positions = starts[:, None] + along
        return gather(self._split, positions, is_real, self._pad_id)


def _shares(used: Sequence[tuple[TokenSplit, float]], batch_size: int) -> np.ndarray:
    """Divide the sequences of a batch among sources with weights, by the largest remainder."""
    exact = np.array([weight for _, weight in used]) * batch_size
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: batch_size - counts.sum()]] += 1
    for (part, weight), count in zip(used, counts, strict=True):
        if not count:
            raise UserError(
                f"the {part.name} split has a probability of {weight:.3g}, less than a sequence of "
                f"config.data.batch_size={batch_size}: use larger batches, a larger weight, or "
                "config.data.mode=window without a stride, which draws each source"
            )
    return counts


def make_batches(
    split: TokenSplit,
    data_config: DataConfig,
    seed: int,
    pad_id: int,
    sequences: slice = slice(None),
) -> "grain.DatasetIterator":
    """Endless iterator of `Batch`; a thread prefetches the next ones.

    ``get_state()`` is a JSON-able dict with the number of batches taken; ``set_state`` on a new
    iterator of the same arguments resumes with the same batches, whatever its `sequences`.

    Raises:
      UserError: the split is too short (`steps_per_epoch`).
    """
    import grain  # slow

    source = BatchSource(split, data_config, seed, pad_id, sequences)
    flags.FLAGS.mark_as_parsed()  # for Grain, which reads its own; scripts have parsed them
    # One thread: a batch takes far less time than a step, and further threads would only
    # compete with the computation for cores.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def _random_draws(seed: int, purpose: int, index: int) -> np.random.Generator:
    """Return the generator of batch or epoch `index` for one of the purposes above."""
    key = np.random.SeedSequence(seed, spawn_key=(purpose, index))
    return np.random.Generator(np.random.Philox(key))


def gather(split: TokenSplit, positions: np.ndarray, is_real: np.ndarray, pad_id: int) -> Batch:
    """Gather a batch of the tokens at `positions` [B, T] and their next ones, all from zero states.

    Where `is_real` is False, there is padding.
    """
    positions = np.where(is_real, positions, 0)
    following = split.tokens[positions + 1].astype(np.int32)
    targets = split.targets
    return Batch(
        tokens=np.where(is_real, split.tokens[positions].astype(np.int32), np.int32(pad_id)),
        targets=np.where(is_real, following, np.int32(pad_id)),
        loss_mask=is_real if targets is None else is_real & targets[positions + 1],
        segment_ids=(~is_real).astype(np.int32),
        reset=np.ones(len(positions), bool),
    )


def document_ends(split: TokenSplit) -> np.ndarray:
    """Positions after the last token of each document, int64 [documents]."""
    return np.append(split.document_starts[1:], len(split.tokens))


def _pieces_per_document(split: TokenSplit, length: int) -> np.ndarray:
    return divide_up(document_ends(split) - split.document_starts - 1, length)


def round_up(number: int, divisor: int) -> int:
    """Round up to a multiple of `divisor`."""
    return -(-number // divisor) * divisor


def divide_up(dividend: Any, divisor: int) -> Any:
    """Divide integers or an array of them, rounded up."""
    return -(-dividend // divisor)
