"""The store of one source: found by its fingerprint, or written."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import logging

from simplernn_jax.config import DataConfig
from simplernn_jax.data import token_parts
from simplernn_jax.data.documents import Corpus
from simplernn_jax.data.partial_folder import partial_folder, remove_partial
from simplernn_jax.data.spool import (
    SplitPlan,
    Spool,
    split_by_document,
    split_by_position,
    write_spool,
)
from simplernn_jax.data.store_folder import DamagedStore, TokenSplit, open_store, remove_store
from simplernn_jax.data.store_writer import write_store
from simplernn_jax.data.token_workers import available_cores
from simplernn_jax.data.tokenized_corpus import hash_of
from simplernn_jax.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.files import sha256_hex

_MAX_LENGTH = 32
"""Maximum number of characters of the task, to leave room for the bar."""

_SECONDS_PER_LINE = 30
"""Seconds between plain lines of a long reading."""


@contextlib.contextmanager
def reading_progress(task: str, total_bytes: int, *, show: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the bytes read so far."""
    if not show:
        yield lambda bytes_read: None
    elif sys.stderr.isatty():
        yield from _bar(task, total_bytes)
    else:
        start = latest = time.monotonic()
        unit, scale = ("kB", 1e3) if total_bytes < 1e6 else ("MB", 1e6)
        logging.info("%s: %.1f %s ...", task, total_bytes / scale, unit)

        def update(bytes_read: int) -> None:
            nonlocal latest
            now = time.monotonic()
            if now - latest < _SECONDS_PER_LINE:
                return
            latest = now
            done = bytes_read / max(total_bytes, 1)
            left = (now - start) * (1 - done) / max(done, 1e-9)
            logging.info("%s: %.0f %%, %.0f s left", task, 100 * done, left)

        yield update
        logging.info("%s: done in %.1f s", task, time.monotonic() - start)


def _bar(task: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        short = task if len(task) <= _MAX_LENGTH else f"{task[: _MAX_LENGTH - 1]}…"
        handle = bar.add_task(short, total=total_bytes)
        shown = 0

        def update(bytes_read: int) -> None:
            nonlocal shown
            # An update costs more than a small document.
            if bytes_read - shown > total_bytes // 1000:
                shown = bytes_read
                bar.update(handle, completed=bytes_read)

        yield update
        bar.update(handle, completed=total_bytes)


_FORMAT = 1
"""Incremented when the split changes, so that old stores are left to old runs."""


def open_or_write(
    cache: Path,
    config: DataConfig,
    seed: int,
    corpus: Corpus,
    tokenizer: Tokenizer,
    show_progress: bool,
) -> tuple[str, list[TokenSplit]]:
    """Open the store of a source in the folder `cache`, after writing it if it is not there.

    Args:
      cache, config, seed, tokenizer, show_progress: as for `prepare_corpus`.
      corpus: that of ``config.source``.

    Returns:
      The name of the store and its splits.

    Raises:
      UserError: the corpus cannot be read or encoded.
      OSError: the disk is full or not writable.
    """
    source = corpus.fingerprint()
    folder = cache / _fingerprint(config, seed, source, hash_of(tokenizer))
    splits = _opened(folder)
    if splits is not None:
        remove_partial(folder)
    else:
        with partial_folder(folder, lambda: _is_whole(folder)) as opened:
            if opened is not None:  # else another process wrote it meanwhile
                parts, result = opened
                spool = _tokenize(parts, config, corpus, source, tokenizer, show_progress)
                plans = _plan(spool, config, seed, tokenizer)
                write_store(result, folder.name, plans, spool)
        try:
            splits = open_store(folder)
        except DamagedStore as error:
            raise UserError(
                f"{folder}: {error} right after it was written; check this disk"
            ) from error
    return folder.name, splits


def _fingerprint(config: DataConfig, seed: int, source: str, tokenizer_hash: str) -> str:
    parts = {
        "format": _FORMAT,
        "source": source,
        "tokenizer": tokenizer_hash,
        "split": config.split,
        "validation_fraction": config.validation_fraction,
        "seed": seed if config.split == "document" else None,
        "encoding_errors": config.encoding_errors,
        "max_bad_records": config.max_bad_records,
    }
    return sha256_hex(json.dumps(parts, sort_keys=True))[:32]


def _tokenize(
    folder: Path,
    config: DataConfig,
    corpus: Corpus,
    fingerprint: str,
    tokenizer: Tokenizer,
    show_progress: bool,
) -> Spool:
    # A version with other parts cannot continue with these.
    spool_folder = folder / f"spool-{token_parts.PART_CHARACTERS}"
    task = f"tokenizing {config.source}"
    with reading_progress(task, corpus.total_bytes, show=show_progress) as on_progress:
        # A process takes as long to start as several parts take as bytes or characters.
        is_fast = isinstance(tokenizer, ByteTokenizer | CharTokenizer)
        num_parts = corpus.total_bytes // token_parts.PART_CHARACTERS
        num_workers = min(available_cores(), num_parts // 8 if is_fast else num_parts)
        spool = write_spool(spool_folder, corpus, tokenizer, on_progress, num_workers)
    if not spool.num_documents:
        raise UserError(f"{config.source}: no text in it; choose another --config.data.source")
    if corpus.fingerprint() != fingerprint:
        raise UserError(f"{config.source}: changed while it was being read; run again")
    return spool


def _plan(spool: Spool, config: DataConfig, seed: int, tokenizer: Tokenizer) -> list[SplitPlan]:
    fraction = config.validation_fraction
    by_position = config.split == "position"
    if not by_position and fraction and spool.num_documents == 1:
        by_position = True
        logging.info(
            "%s: a single document, so its last part is the validation split, as with "
            "--config.data.split=position",
            config.source,
        )
    if by_position:
        return split_by_position(spool, fraction, tokenizer)
    return split_by_document(spool, fraction, seed)


def _opened(folder: Path) -> list[TokenSplit] | None:
    try:
        return open_store(folder)
    except DamagedStore:
        return None


def _is_whole(folder: Path) -> bool:
    """Return whether a store is there, after removing it if it is corrupted."""
    if not os.path.lexists(folder):
        return False
    try:
        open_store(folder)
    except DamagedStore as error:
        logging.warning(
            "%s: the tokenized corpus is corrupted (%s); the text is re-tokenized", folder, error
        )
        remove_store(folder)
        return False
    return True
