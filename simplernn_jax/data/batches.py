"""Batches of training: random examples, carried streams or padded documents.

`BatchSource` is random access and its item *i is* batch *i*, a pure function of the split, the
configuration, the seed and *i*. The position of a run in its data is therefore one integer, and
resuming is exact in every mode.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from simplernn_jax.config import DataConfig
from simplernn_jax.data.token_store import TokenSplit
from simplernn_jax.errors import UserError, counted

ENDLESS = 2**48
"""Length of a source, more batches than any run takes."""

_EXAMPLES, _ROTATION, _RESETS, _ORDER, SOURCES = range(5)
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
            "none of them follows another in its document; use more text with --config.data.source"
        )
    if data_config.mode == "document":
        return _divide_up(int(_pieces_per_document(split, length).sum()), batch_size)
    if data_config.mode == "stream":
        _check_length(
            split,
            batch_size * length,
            f"data.batch_size * data.sequence_length = {batch_size} * {length}",
            "a smaller --config.data.batch_size or --config.data.sequence_length",
        )
        return _divide_up(_divide_up(num_tokens, batch_size), length)
    _check_length(
        split,
        length + 1,
        f"data.sequence_length + 1 = {length} + 1",
        "a smaller --config.data.sequence_length",
    )
    if data_config.stride:
        return _divide_up(_divide_up(num_tokens, data_config.stride), batch_size)
    return _divide_up(num_tokens, batch_size * length)


class BatchSource:
    """Random-access source whose item ``i`` is the `Batch` of optimizer step ``i``.

    ``window``: B examples of T tokens, each beginning anywhere; `reset` everywhere. With a stride,
    one begins every `stride` tokens of the ring, and an epoch has all of them once, in a random
    order; its last batch is filled up with the first ones.

    ``stream``: the documents form a ring, rotated by a random amount each epoch and cut into B
    sequences of equal length (within one token). Batch j of an epoch holds tokens j T to (j+1) T
    of each. The last batch continues into the next sequence rather than being cut short: every
    prediction is made at least once an epoch, fewer than T of a sequence twice, and no step learns
    from a handful of tokens.

    ``document``: each document in consecutive pieces of at most T predictions, in a random order
    each epoch and each from a zero state, padded with `pad_id`; sequences of padding fill the last
    batch. Every prediction is made exactly once an epoch.

    With `sequences`, an item has these sequences of the batch only, bit for bit, and no other is
    read: each of several processes makes its own part.

    Raises:
      UserError: the split is too short (`steps_per_epoch`).
    """

    def __init__(
        self,
        split: TokenSplit,
        data_config: DataConfig,
        seed: int,
        pad_id: int,
        sequences: slice = slice(None),
    ):
        self._steps_per_epoch = steps_per_epoch(split, data_config)
        self._mode = data_config.mode
        self._batch_size = data_config.batch_size
        self._length = data_config.sequence_length
        self._stride = data_config.stride
        self._reset_probability = data_config.reset_probability
        self._seed = seed
        self._pad_id = pad_id
        self._sequences = sequences
        self._name = (
            f"BatchSource({split.name}:{split.content_hash}, {data_config}, seed={seed}, "
            f"pad_id={pad_id}, sequences={sequences})"
        )
        self._split = split
        self._tokens, self._targets = split.tokens, split.targets
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)
        if self._mode == "document":
            per_document = _pieces_per_document(split, self._length)
            self._pieces_until = np.cumsum(per_document)
            self._pieces_before = self._pieces_until - per_document
            self._document_starts = split.document_starts
            self._document_ends = document_ends(split)
            self._pieces = int(self._pieces_until[-1])
        else:
            if self._stride:
                self._pieces = _divide_up(len(self._tokens), self._stride)
            # A sequence may continue from the end of the ring into its beginning, once.
            starts = split.document_starts
            early = starts[starts <= self._length]
            self._boundaries = np.concatenate([starts, early + len(self._tokens)])

    def __len__(self) -> int:
        return ENDLESS

    def __repr__(self) -> str:
        return self._name

    def __getitem__(self, index: Any) -> Batch:
        index = int(index)
        if self._mode == "document":
            return self._document_batch(index)
        if self._mode == "stream":
            return self._stream_batch(index)
        return self.examples(index, self._sequences)

    def examples(self, index: int, sequences: slice | np.ndarray) -> Batch:
        """Return these sequences of batch `index` (mode ``window``)."""
        batch, _ = self._ring_batch(self._example_starts(index)[sequences])
        return batch._replace(reset=~batch.reset)

    def _example_starts(self, index: int) -> np.ndarray:
        num_tokens = len(self._tokens)
        if not self._stride:
            return self._random(_EXAMPLES, index).integers(0, num_tokens, self._batch_size)
        epoch, step = divmod(index, self._steps_per_epoch)
        turn = self._random(_ROTATION, epoch).integers(0, num_tokens)
        places = step * self._batch_size + np.arange(self._batch_size)
        nth = self._order(epoch).take(places, mode="wrap")
        return (turn + nth * self._stride) % num_tokens

    def _random(self, purpose: int, index: int) -> np.random.Generator:
        return random_draws(self._seed, purpose, index)

    def _stream_batch(self, index: int) -> Batch:
        epoch, step = divmod(index, self._steps_per_epoch)
        num_tokens = len(self._tokens)
        turn = self._random(_ROTATION, epoch).integers(0, num_tokens)
        starts = np.arange(self._batch_size)[self._sequences] * num_tokens // self._batch_size
        starts = (turn + starts + step * self._length) % num_tokens
        batch, begins_document = self._ring_batch(starts)
        reset = begins_document | (step == 0)
        if self._reset_probability:
            draws = self._random(_RESETS, index).random(self._batch_size)[self._sequences]
            reset |= draws < self._reset_probability
        return batch._replace(reset=reset)

    def _ring_batch(self, starts: np.ndarray) -> tuple[Batch, np.ndarray]:
        """Return the batch from positions `starts` [B], and whether a document begins at each."""
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
        batch = Batch(
            tokens=tokens[:, :-1].astype(np.int32),
            targets=tokens[:, 1:].astype(np.int32),
            loss_mask=loss_mask,
            segment_ids=np.cumsum(begins[:, :-1], axis=1, dtype=np.int32),
            reset=np.zeros(len(starts), bool),
        )
        return batch, begins[:, 0]

    def _draw_order(self, epoch: int) -> np.ndarray:
        return self._random(_ORDER, epoch).permutation(self._pieces)

    def _document_batch(self, index: int) -> Batch:
        epoch, step = divmod(index, self._steps_per_epoch)
        pieces = self._order(epoch)[step * self._batch_size : (step + 1) * self._batch_size]
        document = np.searchsorted(self._pieces_until, pieces, side="right")
        nth = pieces - self._pieces_before[document]
        starts = self._document_starts[document] + nth * self._length
        counts = np.minimum(self._length, self._document_ends[document] - 1 - starts)
        padding = np.zeros(self._batch_size - len(pieces), np.int64)
        starts = np.append(starts, padding)[self._sequences]
        counts = np.append(counts, padding)[self._sequences]
        along = np.arange(self._length)
        is_real = along < counts[:, None]
        positions = starts[:, None] + along
        tokens, targets, loss_mask = gather(self._split, positions, is_real, self._pad_id)
        return Batch(
            tokens=tokens,
            targets=targets,
            loss_mask=loss_mask,
            segment_ids=(~is_real).astype(np.int32),
            reset=np.ones(len(starts), bool),
        )


def random_draws(seed: int, purpose: int, index: int) -> np.random.Generator:
    """Return the generator of batch or epoch `index` for one of the purposes above."""
    key = np.random.SeedSequence(seed, spawn_key=(purpose, index))
    return np.random.Generator(np.random.Philox(key))


def gather(
    split: TokenSplit, positions: np.ndarray, is_real: np.ndarray, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gather inputs at `positions` [B, T] and their next tokens, int32; `pad_id` elsewhere.

    Returns:
      Inputs, next tokens, and whether these are targets of the loss.
    """
    positions = np.where(is_real, positions, 0)
    inputs = np.where(is_real, split.tokens[positions].astype(np.int32), np.int32(pad_id))
    following = np.where(is_real, split.tokens[positions + 1].astype(np.int32), np.int32(pad_id))
    if split.targets is None:
        return inputs, following, is_real
    return inputs, following, is_real & split.targets[positions + 1]


def document_ends(split: TokenSplit) -> np.ndarray:
    """Positions after the last token of each document, int64 [documents]."""
    return np.append(split.document_starts[1:], len(split.tokens))


def _pieces_per_document(split: TokenSplit, length: int) -> np.ndarray:
    return _divide_up(document_ends(split) - split.document_starts - 1, length)


def round_up(number: int, divisor: int) -> int:
    """Round up to a multiple of `divisor`."""
    return -(-number // divisor) * divisor


def _divide_up(dividend: Any, divisor: int) -> Any:
    return -(-dividend // divisor)


def _check_length(split: TokenSplit, needed: int, arithmetic: str, remedy: str) -> None:
    if len(split.tokens) < needed:
        raise UserError(
            f"too little text: the {split.name} split has {counted(len(split.tokens), 'token')}, "
            f"fewer than {arithmetic} = {needed}; use more text or {remedy}"
        )
