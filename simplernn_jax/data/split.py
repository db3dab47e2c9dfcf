"""Which part of a spooled corpus trains and which is held out."""

import dataclasses

import numpy as np

from simplernn_jax.data.spool import Spool
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SplitPlan:
    """What goes into one side of the split."""

    name: str
    ranges: np.ndarray
    """[documents, 2] int64, start and stop in the spool; in the order they are stored."""
    num_bytes: int
    """UTF-8 bytes of the text in it."""

    @property
    def document_starts(self) -> np.ndarray:
        """[documents] int64, position of each document's first token once stored."""
        lengths = self.ranges[:, 1] - self.ranges[:, 0]
        return np.cumsum(lengths) - lengths


def split_by_document(spool: Spool, fraction: float, seed: int) -> list[SplitPlan]:
    """Holds out a seeded choice of ``max(1, round(fraction * documents))`` documents.

    The training documents come in a seeded random order, the held-out ones in source order.

    Raises:
      UserError: there is only one document, so that none can be held out.
    """
    ranges = np.stack([spool.document_starts[:-1], spool.document_starts[1:]], axis=1)
    count = len(ranges)
    # Raw bits of PCG64 are the same in every version of numpy; its permutations need not be.
    order = np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")
    held_out = min(max(1, round(fraction * count)), count - 1) if fraction > 0 else 0
    if fraction > 0 and held_out == 0:
        raise UserError(
            "the corpus is a single document, so none can be held out; run with "
            "--config.data.split=position or --config.data.validation_fraction=0"
        )
    choices = {"train": order[held_out:], "validation": np.sort(order[:held_out])}
    return [
        SplitPlan(name, ranges[chosen], int(spool.document_bytes[chosen].sum()))
        for name, chosen in choices.items()
        if len(chosen)
    ]


def split_by_position(spool: Spool, fraction: float, tokenizer: Tokenizer) -> list[SplitPlan]:
    """Holds out the last ``max(1, round(fraction * tokens))`` tokens of the stream."""
    total = spool.num_tokens
    held_out = min(max(1, round(fraction * total)), total - 1) if fraction > 0 else 0
    cut = total - held_out
    ranges = np.stack([spool.document_starts[:-1], spool.document_starts[1:]], axis=1)
    train_bytes = _bytes_before(spool, cut, tokenizer)
    sides = {
        "train": (np.minimum(ranges, cut), train_bytes),
        "validation": (np.maximum(ranges, cut), int(spool.document_bytes.sum()) - train_bytes),
    }
    plans = []
    for name, (clipped, num_bytes) in sides.items():
        kept = clipped[clipped[:, 0] < clipped[:, 1]]
        if len(kept):
            plans.append(SplitPlan(name, kept, num_bytes))
    return plans


def _bytes_before(spool: Spool, cut: int, tokenizer: Tokenizer) -> int:
    """Text bytes of the tokens before `cut`.

    Exact for a tokenizer that loses nothing; for another the error stays within one piece.
    """
    piece = int(np.searchsorted(spool.piece_starts, cut)) - 1
    if piece < 0:
        return 0
    whole = int(spool.piece_bytes[:piece].sum())
    begun = np.array([[spool.piece_starts[piece], cut]])
    part = sum(len(tokenizer.decode_bytes(block)) for block in spool.blocks(begun))
    return whole + min(part, int(spool.piece_bytes[piece]))
