"""The tokenized corpus on disk: memory-mapped, fingerprinted, verified, written atomically."""

import dataclasses
import errno
import json
import os
from pathlib import Path

from absl import logging

from simplernn_jax.config import DataConfig
from simplernn_jax.data.corpora import open_corpus
from simplernn_jax.data.documents import Corpus
from simplernn_jax.data.progress import reading_progress
from simplernn_jax.data.spool import (
    SplitPlan,
    Spool,
    split_by_document,
    split_by_position,
    write_spool,
)
from simplernn_jax.data.store_folder import (
    DamagedStore,
    TokenSplit,
    atomic_folder,
    content_hashes,
    open_store,
    remove_store,
    write_store,
)
from simplernn_jax.data.tokenizer import Tokenizer, check_round_trip, load_tokenizer
from simplernn_jax.errors import UserError, counted
from simplernn_jax.files import sha256_hex

_SPOOL_FILE = "spool"
_FORMAT = 1
"""Incremented when the split changes, so that old stores are left to old runs."""

_FEW_TOKENS = 10_000
"""Validation tokens below which the loss is noisy: its standard error is some hundredths."""


@dataclasses.dataclass(frozen=True)
class TokenizedCorpus:
    """Tokenizer and splits of a corpus."""

    tokenizer: Tokenizer
    train: TokenSplit
    validation: TokenSplit | None
    content_hash: str
    """SHA-256 over the tokenizer and both splits: equal hashes, equal data."""

    @property
    def summary(self) -> str:
        """``12,345 training tokens in 3 documents; no validation tokens``."""
        train = _size(self.train, "training token")
        if self.validation is None:
            return f"{train}; no validation tokens"
        return f"{train}; {_size(self.validation, 'validation token')}"

    @property
    def warning(self) -> str:
        """Warning about a small validation split; empty if it is large enough."""
        if self.validation is None or len(self.validation.tokens) >= _FEW_TOKENS:
            return ""
        return (
            f"fewer than {_FEW_TOKENS:,} validation tokens make the loss noisy; use more text, or "
            "hold out more with --config.data.validation_fraction"
        )


def _size(split: TokenSplit, noun: str) -> str:
    documents = counted(len(split.document_starts), "document")
    return f"{counted(len(split.tokens), noun)} in {documents}"


def prepare_corpus(
    config: DataConfig,
    seed: int,
    cache_dir: str,
    *,
    tokenizer: Tokenizer | None = None,
    exclude: tuple[str, ...] = (),
    show_progress: bool = True,
) -> TokenizedCorpus:
    """Open the tokenized corpus of a configuration, tokenizing it if that was not done yet.

    Memory is bounded whatever the size of the corpus. Several processes may do this at once.
    Every byte of the tokens is verified, and a corrupted corpus is re-tokenized.

    Args:
      config: source, tokenizer and split.
      seed: chooses the held-out documents and the order of the others.
      cache_dir: folder of tokenized corpora, one subfolder for each fingerprint.
      tokenizer: a resumed run's; None loads ``config.tokenizer``, which must give back the text.
      exclude: folders, besides `cache_dir`, that are no part of the source; see `open_corpus`.
      show_progress: a bar on a terminal, two plain lines elsewhere.

    Raises:
      UserError: the corpus, the tokenizer or `cache_dir` is unusable, or the disk is full.
    """
    cache = Path(os.path.expanduser(cache_dir))
    corpus = open_corpus(config, exclude=(str(cache), *exclude))
    if tokenizer is None:
        tokenizer = load_tokenizer(config.tokenizer, corpus)
        check_round_trip(tokenizer, config.tokenizer, corpus)
    source = corpus.fingerprint()
    fingerprint = _fingerprint(config, seed, source, _hash_of(tokenizer))
    folder = cache / fingerprint
    try:
        splits = _verified_splits(folder)
        if splits is None:
            with atomic_folder(folder) as temporary:
                spool = _tokenize(temporary, config, corpus, source, tokenizer, show_progress)
                plans = _plan(spool, config, seed, tokenizer)
                write_store(temporary, folder.name, plans, spool)
                spool.path.unlink()
            splits = open_store(folder)
    except OSError as error:
        raise UserError(_disk_problem(error, config.source, folder.parent)) from error
    except DamagedStore as error:
        raise UserError(f"{folder}: {error} right after it was written; check this disk") from error
    return _corpus(tokenizer, splits)


def find_corpus(cache_dir: str, content_hash: str, tokenizer: Tokenizer) -> TokenizedCorpus | None:
    """Open a stored corpus by its content hash; its source need not exist.

    Args:
      cache_dir: as for `prepare_corpus`.
      content_hash: that of the `TokenizedCorpus`.
      tokenizer: that of the corpus.

    Returns:
      None if `cache_dir` holds no such corpus.

    Raises:
      DamagedStore: it is corrupted.
      UserError: it cannot be read.
    """
    damage = None
    for folder in sorted(Path(os.path.expanduser(cache_dir)).glob("[!.]*")):
        try:
            if _content_hash(tokenizer, content_hashes(folder)) != content_hash:
                continue
        except DamagedStore:
            continue  # not a store, or one whose record is lost
        try:
            return _corpus(tokenizer, open_store(folder))
        except DamagedStore as error:
            damage = error
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}; make it readable") from error
    if damage is not None:
        raise damage
    return None


def _hash_of(tokenizer: Tokenizer) -> str:
    return sha256_hex(tokenizer.to_json())


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
    task = f"tokenizing {config.source}"
    with reading_progress(task, corpus.total_bytes, show=show_progress) as on_progress:
        spool = write_spool(folder / _SPOOL_FILE, corpus, tokenizer, on_progress)
    if not spool.document_bytes.size:
        raise UserError(f"{config.source}: no text in it; choose another --config.data.source")
    if corpus.fingerprint() != fingerprint:
        raise UserError(f"{config.source}: changed while it was being read; run again")
    return spool


def _plan(spool: Spool, config: DataConfig, seed: int, tokenizer: Tokenizer) -> list[SplitPlan]:
    fraction = config.validation_fraction
    by_position = config.split == "position"
    if not by_position and fraction and len(spool.document_bytes) == 1:
        by_position = True
        logging.info(
            "%s: a single document, so its last part is the validation split, as with "
            "--config.data.split=position",
            config.source,
        )
    if by_position:
        return split_by_position(spool, fraction, tokenizer)
    return split_by_document(spool, fraction, seed)


def _verified_splits(folder: Path) -> list[TokenSplit] | None:
    """Open a store; None if it is missing or was corrupted and is now removed.

    Raises:
      OSError: it can be neither read nor removed.
    """
    if not os.path.lexists(folder):
        return None
    try:
        return open_store(folder)
    except DamagedStore as error:
        logging.warning(
            "%s: the tokenized corpus is corrupted (%s); the text is re-tokenized", folder, error
        )
    remove_store(folder)
    return None


def _content_hash(tokenizer: Tokenizer, splits: list[str]) -> str:
    return sha256_hex("".join([_hash_of(tokenizer), *splits]))


def _corpus(tokenizer: Tokenizer, splits: list[TokenSplit]) -> TokenizedCorpus:
    by_name = {split.name: split for split in splits}
    content_hash = _content_hash(tokenizer, [split.content_hash for split in splits])
    return TokenizedCorpus(tokenizer, by_name["train"], by_name.get("validation"), content_hash)


def _disk_problem(error: OSError, source: str, cache_dir: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        problem = "the disk is full; free some space there"
    else:
        problem = f"{error.strerror or error}; make it writable"
    return (
        f"{cache_dir}: {problem} or choose another folder with --config.data.cache_dir "
        f"(it was to hold the tokens of {source})"
    )
