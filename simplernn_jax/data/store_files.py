"""The files of a token store: written once, fully verified before use.

NAME/train.tokens   token ids, unsigned
NAME/train.starts   positions of the first token of each document, int64
NAME/train.targets  whether each token is a target of the loss, bool; only if some are not
NAME/validation.*   the same, unless everything trains
NAME/meta.json      manifest: dtype, and a SHA-256 over the files of each split, sealed (`files`)

Documents are stored in a seeded random order, which is known when all of them are counted. So the
tokens are first written to a temporary file in source order (`tokenization`), then to the store.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from simplernn_jax.config import DataConfig
from simplernn_jax.data.token_split import TokenSplit
from simplernn_jax.data.tokenization import SourceTokens
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.files import check_damage, open_file, read_sealed, sync, write_sealed

META_FILE = "meta.json"
"""Manifest of a store."""


class CorruptStore(UserError):
    """A file of a store is not as it was written."""


class SplitPlan(NamedTuple):
    """One side of the split."""

    name: str
    ranges: np.ndarray
    """[documents, 2] int64, start and stop of each document in the source, in stored order."""
    num_bytes: int
    """UTF-8 bytes of its targets."""


def plan_splits(
    tokens: SourceTokens, config: DataConfig, seed: int, tokenizer: Tokenizer
) -> list[SplitPlan]:
    """Divide documents into training and validation, as ``config.split`` says.

    ``document`` holds out a seeded choice of ``max(1, round(fraction * documents))`` documents. The
    training documents come in a seeded random order, the held-out ones in source order.
    ``position`` holds out the last ``max(1, round(fraction * tokens))`` tokens of the stream; so
    does ``document`` if there is a single one.
    """
    fraction, documents = config.validation_fraction, tokens.documents
    by_position = config.split == "position"
    if not by_position and fraction and len(documents) == 1:
        by_position = True
        logging.info("%s: a single document, so its end is held out", config.source)
    total = int(tokens.piece_starts[-1])
    count = total if by_position else len(documents)
    held_out = min(max(1, round(fraction * count)), count - 1) if fraction > 0 else 0
    if by_position:
        cut = total - held_out
        train_bytes = _bytes_before(tokens, cut, tokenizer)
        sides = [
            (documents.clip(0, cut), train_bytes),
            (documents.clip(cut, total), int(tokens.piece_bytes[-1]) - train_bytes),
        ]
    else:
        # Raw bits of PCG64 are the same in every version of numpy; its permutations need not be.
        order = np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")
        sides = [
            (documents[chosen], int(tokens.document_bytes[chosen].sum()))
            for chosen in (order[held_out:], np.sort(order[:held_out]))
        ]
    plans = [
        SplitPlan(name, ranges[ranges[:, 0] < ranges[:, 1]], num_bytes)
        for name, (ranges, num_bytes) in zip(("train", "validation"), sides, strict=True)
    ]
    return [plan for plan in plans if len(plan.ranges)]


def _bytes_before(tokens: SourceTokens, cut: int, tokenizer: Tokenizer) -> int:
    """Text bytes of the tokens before `cut`.

    Exact for a lossless tokenizer; for another one, the error stays within one piece.
    """
    piece = int(np.searchsorted(tokens.piece_starts, cut)) - 1
    whole, end = tokens.piece_bytes[piece : piece + 2].tolist()
    begun = np.array([[tokens.piece_starts[piece], cut]])
    part = sum(len(tokenizer.decode_bytes(block)) for block in tokens.blocks(begun))
    return int(whole + min(part, end - whole))


def write_store(
    folder: Path, unfinished: Path, plans: list[SplitPlan], tokens: SourceTokens
) -> None:
    """Write a store into the new folder `unfinished`, which then becomes `folder`.

    Raises:
      OSError: the disk is full or not writable.
    """
    unfinished.mkdir()
    splits = {plan.name: _write_split(unfinished, plan, tokens) for plan in plans}
    meta = {"store": folder.name, "dtype": tokens.dtype.str, "splits": splits}
    write_sealed(unfinished / META_FILE, json.dumps(meta, indent=2) + "\n")
    for path in [*unfinished.iterdir(), unfinished]:
        sync(path)
    os.rename(unfinished, folder)
    sync(folder.parent)


def _write_split(folder: Path, plan: SplitPlan, tokens: SourceTokens) -> dict[str, Any]:
    lengths = plan.ranges[:, 1] - plan.ranges[:, 0]
    starts = (np.cumsum(lengths) - lengths).astype("<i8")
    arrays: dict[str, Iterable[np.ndarray]] = {
        "tokens": tokens.blocks(plan.ranges),
        "starts": [starts],
    }
    if tokens.fim_ids or not tokens.piece_targets.all():
        arrays["targets"] = tokens.target_blocks(plan.ranges)
    whole = hashlib.sha256()
    for suffix, blocks in arrays.items():
        with open(folder / f"{plan.name}.{suffix}", "wb") as file:
            for block in blocks:
                whole.update(block.data)
                file.write(block.data)
    return {"num_bytes": plan.num_bytes, "content_hash": whole.hexdigest()}


def open_store(folder: Path) -> list[TokenSplit]:
    """Verify every byte of a store and map its tokens.

    Raises:
      CorruptStore: a file is missing, not a regular file, or not what was written.
      OSError: it may not be read, or the machine has no memory or no file descriptor for it.
    """
    path = folder / META_FILE
    body = read_sealed(path)
    if body is None:
        raise CorruptStore(f"{path}: missing, or was changed")
    try:
        meta = json.loads(body)
        if meta["store"] != folder.name or np.dtype(meta["dtype"]).kind != "u":
            raise ValueError("another store")
        return [_open_split(folder, name, meta) for name in meta["splits"]]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise CorruptStore(f"{path}: not the record of this store") from error


def _open_split(folder: Path, name: str, meta: dict[str, Any]) -> TokenSplit:
    split, whole = meta["splits"][name], hashlib.sha256()
    paths = {suffix: folder / f"{name}.{suffix}" for suffix in ("tokens", "starts", "targets")}
    if not os.path.lexists(paths["targets"]):
        del paths["targets"]
    try:
        for path in paths.values():
            with open_file(path) as file:
                hashlib.file_digest(file, lambda: whole)
        if whole.hexdigest() != split["content_hash"]:
            raise CorruptStore(f"{folder}: the {name} split was changed")
        dtypes = {"tokens": meta["dtype"], "starts": "<i8", "targets": "|b1"}
        # Indexing the memmap class costs more than a plain array over the same memory.
        arrays = {
            suffix: np.asarray(np.memmap(path, dtypes[suffix], "r"))
            for suffix, path in paths.items()
        }
    except OSError as error:
        check_damage(error)
        raise CorruptStore(f"{path}: {error.strerror}") from error
    return TokenSplit(
        name,
        arrays["tokens"],
        arrays["starts"],
        split["num_bytes"],
        split["content_hash"],
        arrays.get("targets"),
    )
