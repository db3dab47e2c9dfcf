"""Tokenized corpora on disk, of one source or of a mixture: prepared, or found by their content."""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging

from simplernn_jax.config import DataConfig
from simplernn_jax.data import bpe
from simplernn_jax.data.corpora import open_corpus
from simplernn_jax.data.mixture import WeightedSource, parse_mixture
from simplernn_jax.data.pretrained_tokenizer import MAX_TOKENIZER_BYTES, PretrainedTokenizer
from simplernn_jax.data.source_store import open_or_write
from simplernn_jax.data.store_folder import (
    MIXTURE_SUFFIX,
    DamagedStore,
    TokenSplit,
    content_hashes,
    open_store,
)
from simplernn_jax.data.tokenized_corpus import TokenizedCorpus, hash_splits, of_mixture, of_splits
from simplernn_jax.data.tokenizer import Tokenizer, check_round_trip
from simplernn_jax.data.tokenizer_loading import load_tokenizer
from simplernn_jax.errors import DISK_ADVICE, UserError, counted
from simplernn_jax.files import read_sealed, write_sealed

__all__ = ["TokenSplit", "TokenizedCorpus", "find_corpus", "prepare_corpus", "train_tokenizer"]

_STORE_NAME = re.compile("[0-9a-f]{32}")


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
      tokenizer: a resumed run's; None loads ``config.tokenizer``, which must give back the text,
        or trains it with `train_tokenizer`.
      exclude: folders, besides `cache_dir`, that are no part of the source; see `open_corpus`.
      show_progress: a bar on a terminal; elsewhere a line at the start, every 30 seconds and at the
        end.

    Returns:
      The tokenizer and both splits, whose tokens are memory-mapped.

    Raises:
      UserError: the corpus, the tokenizer or `cache_dir` is unusable, or the disk is full.
    """
    cache = _cache_path(cache_dir)
    mixture = parse_mixture(config.source)
    sources = mixture or [WeightedSource(config.source, 1.0)]
    configs = [dataclasses.replace(config, source=source) for source, _ in sources]
    corpora = [open_corpus(one, exclude=(str(cache), *exclude)) for one in configs]
    if tokenizer is None and config.tokenizer.startswith(bpe.PREFIX):
        tokenizer = train_tokenizer(
            config, seed, cache_dir, exclude=exclude, show_progress=show_progress
        )
    elif tokenizer is None:
        tokenizer = load_tokenizer(config.tokenizer, *corpora)
        for corpus in corpora:
            check_round_trip(tokenizer, config.tokenizer, corpus)
    stores = []
    for one, corpus in zip(configs, corpora, strict=True):
        with _disk_errors(cache, one.source):
            stores.append(open_or_write(cache, one, seed, corpus, tokenizer, show_progress))
    prepared = [of_splits(tokenizer, splits) for _, splits in stores]
    if mixture is None:
        return prepared[0]
    with _disk_errors(cache, config.source):
        return _mix(cache, mixture, [name for name, _ in stores], prepared)


def train_tokenizer(
    config: DataConfig,
    seed: int,
    cache_dir: str,
    *,
    exclude: tuple[str, ...] = (),
    show_progress: bool = True,
) -> PretrainedTokenizer:
    """Train the BPE of ``config.tokenizer``, or find it in `cache_dir`.

    It is trained on the training split of the text as bytes. With a position split, the cut in
    tokens can differ a little from the cut in bytes.

    Args:
      config, seed, cache_dir, exclude, show_progress: as for `prepare_corpus`.

    Raises:
      UserError: ``config.tokenizer`` is no ``bpe:SIZE``, or as for `prepare_corpus`.
    """
    vocab_size = bpe.parse_spec(config.tokenizer)
    corpus = prepare_corpus(
        dataclasses.replace(config, tokenizer="byte"),
        seed,
        cache_dir,
        exclude=exclude,
        show_progress=show_progress,
    )
    cache = _cache_path(cache_dir)
    # Hidden: `find_corpus` looks at the other names. Version 1 had words of any length.
    path = cache / f".bpe-v2-{vocab_size}-{corpus.content_hash}.json"
    with _disk_errors(cache, config.source):
        content = read_sealed(path, MAX_TOKENIZER_BYTES)
        if content is None:
            content = bpe.train_bpe(corpus.train, vocab_size) + "\n"
            write_sealed(path, content)
    return PretrainedTokenizer(content)


def _cache_path(cache_dir: str) -> Path:
    if "\0" in os.fspath(cache_dir):
        raise UserError(f"cache_dir={cache_dir}: no path holds a NUL character; correct it")
    return Path(os.path.expanduser(cache_dir))


def find_corpus(cache_dir: str, content_hash: str, tokenizer: Tokenizer) -> TokenizedCorpus | None:
    """Open a stored corpus by its content hash; its source need not exist.

    Returns:
      None if `cache_dir` holds no such corpus.

    Raises:
      DamagedStore: it is corrupted.
      UserError: it cannot be read.
    """
    cache = _cache_path(cache_dir)
    damage, unreadable = None, ""
    for path in sorted(cache.glob("[!.]*")):
        try:
            if path.name.endswith(MIXTURE_SUFFIX):
                found = _read_mixture(path).get("content_hash")
            else:
                found = hash_splits(tokenizer, content_hashes(path))
            if found != content_hash:
                continue
        except DamagedStore:
            continue  # not a store, or one whose record is lost
        except OSError as error:  # perhaps another store
            if _STORE_NAME.fullmatch(path.name) or path.name.endswith(MIXTURE_SUFFIX):
                unreadable = f"{path}: {error.strerror}; make it readable"
            continue
        try:
            if path.name.endswith(MIXTURE_SUFFIX):
                return _open_mixture(path, tokenizer)
            return of_splits(tokenizer, open_store(path))
        except DamagedStore as error:
            damage = error
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; make it readable") from error
    if damage is not None:
        raise damage
    if unreadable:
        raise UserError(unreadable)
    return None


def _mix(
    cache: Path, sources: list[WeightedSource], stores: list[str], corpora: list[TokenizedCorpus]
) -> TokenizedCorpus:
    """Create the corpus of a mixture, and record it for `find_corpus`."""
    names, weights = zip(*sources, strict=True)
    mixed = of_mixture(corpora, names, weights)
    for (source, weight), corpus in zip(sources, corpora, strict=True):
        size = counted(len(corpus.train.tokens), "training token")
        logging.info("%s: probability %.4g, %s", source, weight, size)
    record = {
        "content_hash": mixed.content_hash,
        "sources": list(names),
        "weights": list(weights),
        "stores": stores,
    }
    body = json.dumps(record, indent=2) + "\n"
    path = cache / f"{mixed.content_hash[:32]}{MIXTURE_SUFFIX}"
    if read_sealed(path) != body:
        write_sealed(path, body)
    return mixed


def _open_mixture(path: Path, tokenizer: Tokenizer) -> TokenizedCorpus:
    """Open a mixture by the file that `_mix` wrote; `DamagedStore` if it or a store is bad."""
    record = _read_mixture(path)
    corpora = [of_splits(tokenizer, open_store(path.parent / name)) for name in record["stores"]]
    mixed = of_mixture(corpora, record["sources"], record["weights"])
    if mixed.content_hash != record["content_hash"]:
        raise DamagedStore(f"{path.name} is that of other stores")
    return mixed


def _read_mixture(path: Path) -> dict[str, Any]:
    body = read_sealed(path)
    if body is None:
        raise DamagedStore(f"{path.name} was changed")
    try:
        record: dict[str, Any] = json.loads(body)
        stores = list(map(_STORE_NAME.fullmatch, record["stores"]))
        lengths = {len(record[name]) for name in ("sources", "weights", "stores")}
        if not all(stores) or lengths != {len(stores)} or not stores:
            raise ValueError
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise DamagedStore(f"{path.name} is not a record of a mixture") from error
    return record


@contextlib.contextmanager
def _disk_errors(cache: Path, source: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = DISK_ADVICE.get(error.errno or 0, "check this folder")
        problem = error.strerror or str(error)
        raise UserError(
            f"{cache}: {problem}; {advice}, or choose another folder with --config.data.cache_dir "
            f"(it was to hold the tokens of {source})"
        ) from error
