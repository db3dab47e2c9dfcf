"""Batches of a run: an iterator over the batches of one source or of a mixture."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from simplernn_jax.config import DataConfig
from simplernn_jax.data.batches import (
    ENDLESS,
    SOURCES,
    Batch,
    BatchSource,
    random_draws,
    steps_per_epoch,
)
from simplernn_jax.data.token_split import MixedSplit
from simplernn_jax.data.token_store import TokenSplit
from simplernn_jax.errors import UserError


def make_batches(
    split: TokenSplit,
    data_config: DataConfig,
    seed: int,
    pad_id: int,
    sequences: slice = slice(None),
) -> grain.DatasetIterator:
    """Endless iterator of `Batch`; a thread prefetches the next ones.

    ``get_state()`` is a JSON-able dict with the number of batches taken; ``set_state`` on a new
    iterator of the same arguments resumes with the same batches, whatever its `sequences`.

    Raises:
      UserError: the split is too short (`steps_per_epoch`).
    """
    source: BatchSource | MixedBatchSource
    if isinstance(split, MixedSplit):
        source = MixedBatchSource(split, data_config, seed, pad_id, sequences)
    else:
        source = BatchSource(split, data_config, seed, pad_id, sequences)
    flags.FLAGS.mark_as_parsed()  # for Grain, which reads its own; scripts have parsed them
    # One thread: a batch takes far less time than a step, and further threads would only
    # compete with the computation for cores.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


class MixedBatchSource:
    """Random-access source whose item ``i`` is batch ``i`` of a mixture, a function of seed and i.

    Random windows: the source of each sequence is drawn with the probabilities of the mixture, and
    its window as `BatchSource` does. Otherwise each source has a fixed share of the sequences (by
    the largest remainder), which pass through it as if it were alone, in separate epochs.

    Raises:
      UserError: a source is too short, or has a weight but no sequence.
    """

    def __init__(
        self,
        split: MixedSplit,
        data_config: DataConfig,
        seed: int,
        pad_id: int,
        sequences: slice = slice(None),
    ):
        self._seed = seed
        self._batch_size = data_config.batch_size
        self._local = np.arange(self._batch_size)[sequences]
        self._is_drawn = data_config.mode == "window" and not data_config.stride
        self._name = (
            f"MixedBatchSource({split.weights}, {split.content_hash}, {data_config}, seed={seed}, "
            f"pad_id={pad_id}, sequences={sequences})"
        )
        weighted = zip(split.parts, split.weights, strict=True)
        used = [(part, weight) for part, weight in weighted if weight]
        self._until = np.cumsum([weight for _, weight in used])[:-1]
        if self._is_drawn:
            self._sources = [BatchSource(part, data_config, seed, pad_id) for part, _ in used]
            return
        self._sources = []
        first = 0
        for (part, _), count in zip(used, _shares(used, self._batch_size), strict=True):
            config = dataclasses.replace(data_config, batch_size=count)
            steps_per_epoch(part, config)  # every process rejects a source that is too short
            here = self._local[(self._local >= first) & (self._local < first + count)] - first
            if len(here):
                own = slice(int(here[0]), int(here[-1]) + 1)
                self._sources.append(BatchSource(part, config, seed, pad_id, own))
            first += count

    def __len__(self) -> int:
        return ENDLESS

    def __repr__(self) -> str:
        return self._name

    def __getitem__(self, index: Any) -> Batch:
        index = int(index)
        if not self._is_drawn:
            return _concatenate([source[index] for source in self._sources])
        draws = random_draws(self._seed, SOURCES, index).random(self._batch_size)[self._local]
        chosen = np.searchsorted(self._until, draws, side="right")
        order = np.argsort(chosen, kind="stable")
        batches = [
            self._sources[number].examples(index, self._local[chosen == number])
            for number in np.unique(chosen)
        ]
        place = np.argsort(order)
        return Batch(*(array[place] for array in _concatenate(batches)))


def _concatenate(batches: Sequence[Batch]) -> Batch:
    return Batch(*map(np.concatenate, zip(*batches, strict=True)))


def _shares(used: Sequence[tuple[TokenSplit, float]], batch_size: int) -> list[int]:
    """Divide the sequences of a batch among sources with weights, by the largest remainder."""
    exact = np.array([weight for _, weight in used]) * batch_size
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: batch_size - counts.sum()]] += 1
    for (part, weight), count in zip(used, counts, strict=True):
        if not count:
            raise UserError(
                f"the {part.name} split has a probability of {weight:.3g}, less than a sequence of "
                f"--config.data.batch_size={batch_size}: use larger batches, a larger weight, or "
                "random windows, whose source is drawn"
            )
    return [int(count) for count in counts]
