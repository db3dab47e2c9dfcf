"""Tokenized corpora on disk, of one source or of a mixture: prepared, or found by their content."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import filelock
from absl import logging

from simplernn_jax.config import DataConfig
from simplernn_jax.data.corpora import open_corpus, parse_mixture
from simplernn_jax.data.documents import Corpus
from simplernn_jax.data.pretrained_tokenizer import (
    BPE_PREFIX,
    MAX_TOKENIZER_BYTES,
    PretrainedTokenizer,
    bpe_size,
    train_bpe,
)
from simplernn_jax.data.store_files import CorruptStore, open_store, plan_splits, write_store
from simplernn_jax.data.token_split import TokenSplit, union
from simplernn_jax.data.tokenization import tokenize
from simplernn_jax.data.tokenizer import (
    InfillingTokenizer,
    Tokenizer,
    check_round_trip,
    load_tokenizer,
)
from simplernn_jax.errors import DISK_ADVICE, UserError, counted
from simplernn_jax.files import read_sealed, sha256_hex, take_lock, write_sealed

__all__ = ["TokenSplit", "TokenizedCorpus", "find_corpus", "prepare_corpus", "train_tokenizer"]

_FORMAT = 3
"""Incremented when the tokens or the split change, so that old stores are left to old runs."""
_NAME = re.compile("[0-9a-f]{32}")
"""Name of a store, and the beginning of a hash."""
_FEW_TOKENS = 10_000
"""Validation tokens below which the loss is noisy: its standard error is some hundredths."""


@dataclasses.dataclass(frozen=True)
class TokenizedCorpus:
    """Tokenizer and splits of a corpus."""

    tokenizer: Tokenizer
    """Of both splits."""
    train: TokenSplit
    """Documents to train on."""
    validation: TokenSplit | None
    """Held-out documents; None if ``data.validation_fraction`` is 0."""
    content_hash: str
    """SHA-256 over the tokenizer and both splits: equal hashes, equal data."""

    @classmethod
    def from_splits(
        cls,
        tokenizer: Tokenizer,
        splits: Sequence[Sequence[TokenSplit]],
        mixture: Sequence[tuple[str, float]] | None,
    ) -> "TokenizedCorpus":
        """Create the corpus of one source, or of a mixture, from the splits of each source."""
        start = sha256_hex(tokenizer.to_json())
        hashes = [sha256_hex(start + "".join(x.content_hash for x in one)) for one in splits]
        train = [x for one in splits for x in one if x.name == "train"]
        held_out = [x for one in splits for x in one if x.name == "validation"]
        if mixture is None:
            return cls(tokenizer, train[0], held_out[0] if held_out else None, hashes[0])
        sources, weights = zip(*mixture, strict=True)
        return cls(
            tokenizer,
            union("train", train, sources, weights),
            union("validation", held_out, sources, weights) if held_out else None,
            sha256_hex(json.dumps([hashes, weights])),
        )

    @property
    def summary(self) -> str:
        """``12,345 training tokens in 3 documents; no validation tokens``."""
        held_out = self.validation
        validation = "no validation tokens" if held_out is None else _size(held_out, "validation")
        return f"{_size(self.train, 'training')}; {validation}"

    def warning(self, validation_fraction: float) -> str:
        """Warn of a validation split that is small, or far larger than asked; empty if neither."""
        size = 0 if self.validation is None else len(self.validation.tokens)
        share = size / (len(self.train.tokens) + size)
        if 0 < size < _FEW_TOKENS:
            return (
                f"fewer than {_FEW_TOKENS:,} validation tokens make the loss noisy; use more text, "
                "or hold out more with config.data.validation_fraction"
            )
        if share > max(2 * validation_fraction, 0.3):
            return f"{share:.0%} of the text is held out; config.data.split=position holds out less"
        return ""


def _size(split: TokenSplit, kind: str) -> str:
    documents = counted(len(split.document_starts), "document")
    return f"{counted(len(split.tokens), f'{kind} token')} in {documents}"


def prepare_corpus(
    config: DataConfig,
    seed: int,
    cache_dir: str,
    *,
    tokenizer: Tokenizer | None = None,
    exclude: tuple[str, ...] = (),
) -> TokenizedCorpus:
    """Open the tokenized corpus of a configuration, tokenizing it if that was not done yet.

    Memory is bounded, except for about 70 bytes per document. Several processes may do this at
    once. Every byte of the tokens is verified, and a corrupted corpus is re-tokenized.

    Args:
      config: source, tokenizer and split.
      seed: chooses the held-out documents and the order of the others.
      cache_dir: folder of tokenized corpora, one subfolder for each fingerprint.
      tokenizer: a resumed run's; None loads ``config.tokenizer``, which must give back the text,
        or trains it with `train_tokenizer`.
      exclude: folders, besides `cache_dir`, that do not belong to the source; see `open_corpus`.

    Returns:
      The tokenizer and both splits, whose tokens are memory-mapped.

    Raises:
      UserError: the corpus, the tokenizer or `cache_dir` is unusable, or the disk is full.
    """
    cache = Path(cache_dir).expanduser()
    mixture = parse_mixture(config.source)
    sources = mixture or [(config.source, 1.0)]
    configs = [dataclasses.replace(config, source=source) for source, _ in sources]
    corpora = [open_corpus(one, exclude=(str(cache), *exclude)) for one in configs]
    if tokenizer is None:
        if config.tokenizer.startswith(BPE_PREFIX):
            tokenizer = train_tokenizer(config, seed, cache_dir, exclude=exclude)
        else:
            tokenizer = load_tokenizer(config.tokenizer, *corpora)
            for corpus in corpora:
                check_round_trip(tokenizer, config.tokenizer, corpus, config.fim_rate > 0)
        if config.fim_rate:
            tokenizer = InfillingTokenizer(tokenizer)
    elif config.fim_rate and not isinstance(tokenizer, InfillingTokenizer):
        raise UserError(
            f"config.data.fim_rate={config.fim_rate:g}: the model to start from was not trained "
            "with it; omit it, or train a new model"
        )
    with _disk_errors(cache, config.source):
        stores = [
            _open_or_write(cache, one, seed, corpus, tokenizer)
            for one, corpus in zip(configs, corpora, strict=True)
        ]
        prepared = TokenizedCorpus.from_splits(tokenizer, [splits for _, splits in stores], mixture)
        path = _record_path(cache, prepared.content_hash)
        body = json.dumps([[name for name, _ in stores], mixture]) + "\n"
        if read_sealed(path) != body:
            write_sealed(path, body)
    for part, weight in zip(prepared.train.parts, prepared.train.weights, strict=True):
        logging.info("%s: probability %.4g, %s", part.name, weight, _size(part, "training"))
    return prepared


def _record_path(cache: Path, content_hash: str) -> Path:
    """File that names the stores of a corpus for `find_corpus`; hidden, unlike them."""
    return cache / f".corpus-{content_hash[:32]}.json"


def train_tokenizer(
    config: DataConfig, seed: int, cache_dir: str, *, exclude: tuple[str, ...] = ()
) -> PretrainedTokenizer:
    """Train the BPE of ``config.tokenizer``, or find it in `cache_dir`.

    It is trained on the training split of the text as bytes. With a position split, the cut in
    tokens can differ a little from the cut in bytes.

    Args:
      config, seed, cache_dir, exclude: as for `prepare_corpus`.

    Raises:
      UserError: ``config.tokenizer`` is not ``bpe:SIZE``, or as for `prepare_corpus`.
    """
    vocab_size = bpe_size(config.tokenizer)
    as_bytes = dataclasses.replace(config, tokenizer="byte", fim_rate=0.0)
    corpus = prepare_corpus(as_bytes, seed, cache_dir, exclude=exclude)
    cache = Path(cache_dir).expanduser()
    # Hidden, unlike stores. Version 1 had words of any length.
    path = cache / f".bpe-v2-{vocab_size}-{corpus.content_hash}.json"
    with _disk_errors(cache, config.source):
        content = read_sealed(path, MAX_TOKENIZER_BYTES)
        if content is None:
            content = train_bpe(corpus.train, vocab_size) + "\n"
            write_sealed(path, content)
    return PretrainedTokenizer(content)


def find_corpus(cache_dir: str, content_hash: str, tokenizer: Tokenizer) -> TokenizedCorpus | None:
    """Open a stored corpus by its content hash; its source need not exist.

    Returns:
      None if `cache_dir` holds no such corpus.

    Raises:
      CorruptStore: it is corrupted.
      UserError: it cannot be read.
    """
    cache = Path(cache_dir).expanduser()
    path = _record_path(cache, content_hash)
    # The hash is a checkpoint's, and the folder may be a stranger's: no path leads out of it.
    if not _NAME.fullmatch(content_hash[:32]) or not os.path.lexists(path):
        return None
    try:
        body = read_sealed(path)
        with contextlib.suppress(ValueError, TypeError, LookupError, RecursionError):
            stores, mixture = json.loads(body or "")
            if all(map(_NAME.fullmatch, stores)):
                splits = [open_store(cache / name) for name in stores]
                corpus = TokenizedCorpus.from_splits(tokenizer, splits, mixture)
                if corpus.content_hash == content_hash:
                    return corpus
    except OSError as error:
        raise UserError(f"{cache}: {error.strerror}; make it readable") from error
    raise CorruptStore(f"{path}: was changed, or belongs to other stores")


def _open_or_write(
    cache: Path, config: DataConfig, seed: int, corpus: Corpus, tokenizer: Tokenizer
) -> tuple[str, list[TokenSplit]]:
    """Open the store of a source, after writing it if it is missing; return its name too.

    Raises:
      UserError: the corpus cannot be read or encoded.
      OSError: the disk is full or not writable.
    """
    fingerprint = corpus.fingerprint()
    folder = cache / _store_name(config, seed, fingerprint, tokenizer)
    with contextlib.suppress(CorruptStore):
        return folder.name, open_store(folder)
    cache.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        if os.path.lexists(folder):
            try:
                return folder.name, open_store(folder)  # which another process has just written
            except CorruptStore as error:
                logging.warning("%s (corrupted); the text is re-tokenized", error)
                shutil.rmtree(folder)
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        temporary.mkdir()
        try:
            corpus.fim = (config.fim_rate, seed) if config.fim_rate else None
            tokens = tokenize(temporary / "tokens", corpus, tokenizer, config.source)
            if not len(tokens.documents):
                raise UserError(f"{config.source}: no text in it; choose another source")
            if corpus.fingerprint() != fingerprint:
                raise UserError(f"{config.source}: changed while it was being read; run again")
            plans = plan_splits(tokens, config, seed, tokenizer)
            write_store(folder, temporary / "store", plans, tokens)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder.name, open_store(folder)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a store, which ends with the process, if need be after waiting for it."""
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        take_lock(lock, timeout=0)
    except filelock.Timeout:
        logging.info("waiting for another process that writes %s", folder)
        take_lock(lock)
    try:
        yield
    finally:
        lock.release()


def _store_name(config: DataConfig, seed: int, fingerprint: str, tokenizer: Tokenizer) -> str:
    parts = {
        "format": _FORMAT,
        "source": fingerprint,
        "tokenizer": sha256_hex(tokenizer.to_json()),
        "split": config.split,
        "validation_fraction": config.validation_fraction,
        "seed": seed if config.split == "document" else None,
        "encoding_errors": config.encoding_errors,
        "max_malformed_records": config.max_malformed_records,
    }
    if config.fim_rate:
        parts["fim"] = [config.fim_rate, seed]
    return sha256_hex(json.dumps(parts, sort_keys=True))[:32]


@contextlib.contextmanager
def _disk_errors(cache: Path, source: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = DISK_ADVICE.get(error.errno or 0, "check this folder")
        problem = error.strerror or str(error)
        raise UserError(
            f"{cache}: {problem}; {advice}, or choose another folder with config.data.cache_dir "
            f"(it was to hold the tokens of {source})"
        ) from error
