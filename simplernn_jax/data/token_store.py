"""The tokenized corpus on disk: memory-mapped, fingerprinted, written once and atomically."""

import dataclasses
import errno
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from simplernn_jax.config import DataConfig
from simplernn_jax.data.atomic_folder import atomic_folder
from simplernn_jax.data.corpora import open_corpus
from simplernn_jax.data.documents import Corpus
from simplernn_jax.data.progress import reading_progress
from simplernn_jax.data.split import SplitPlan, split_by_document, split_by_position
from simplernn_jax.data.spool import Spool, write_spool
from simplernn_jax.data.tokenizer import Tokenizer, load_tokenizer
from simplernn_jax.errors import UserError

_META_FILE = "meta.json"
_SPOOL_FILE = "spool"
_FORMAT = 1
"""Raised when the layout of a store or the way to a split changes, so that old ones are left."""


@dataclasses.dataclass(frozen=True)
class TokenSplit:
    """One side of the split: documents one after another, each BOS, its tokens, EOS."""

    name: str
    """``train`` or ``validation``."""
    tokens: np.ndarray
    """[N] memory-mapped ids, the smallest unsigned dtype that holds the vocabulary."""
    document_starts: np.ndarray
    """[documents] int64, position of the first token of each document. A position split cuts one
    document: its rest opens the validation split at 0, without a BOS."""
    num_bytes: int
    """UTF-8 bytes of the text in it."""
    content_hash: str
    """SHA-256 of the tokens and the document starts."""

    @property
    def num_predictions(self) -> int:
        """Positions whose next token belongs to the same document."""
        return len(self.tokens) - len(self.document_starts)


@dataclasses.dataclass(frozen=True)
class TokenizedCorpus:
    """What `prepare_corpus` returns."""

    tokenizer: Tokenizer
    train: TokenSplit
    validation: TokenSplit | None
    content_hash: str
    """SHA-256 over the tokenizer and both splits: equal hashes, equal data."""


def prepare_corpus(
    config: DataConfig,
    seed: int,
    cache_dir: str,
    *,
    tokenizer: Tokenizer | None = None,
    exclude: tuple[str, ...] = (),
    show_progress: bool = True,
) -> TokenizedCorpus:
    """Opens the tokenized corpus of a configuration, writing it first where there is none.

    Memory stays bounded however large the corpus is. Several processes may do this at once.

    Args:
      config: source, tokenizer and split.
      seed: chooses the held-out documents and the order of the others.
      cache_dir: folder of tokenized corpora, one subfolder for each fingerprint.
      tokenizer: a resumed run's; None loads ``config.tokenizer``.
      exclude: folders, besides `cache_dir`, that are no part of the source; see `open_corpus`.
      show_progress: a bar on a terminal, two plain lines elsewhere.

    Raises:
      UserError: the corpus, the tokenizer or `cache_dir` is unusable, or the disk is full.
    """
    cache = Path(cache_dir).expanduser()
    corpus = open_corpus(config, exclude=(str(cache), *exclude))
    if tokenizer is None:
        tokenizer = load_tokenizer(config.tokenizer, corpus)
    source = corpus.fingerprint()
    fingerprint = _fingerprint(config, seed, source, _hash_of(tokenizer))
    folder = cache / fingerprint
    try:
        meta = _read_meta(folder)
        if meta is None:
            with atomic_folder(folder) as temporary:
                spool = _tokenize(temporary, config, corpus, source, tokenizer, show_progress)
                _write_splits(temporary, _plan(spool, config, seed, tokenizer), spool)
            meta = _read_meta(folder)
    except OSError as error:
        raise UserError(_disk_problem(error, config.source, folder.parent)) from error
    if meta is None:
        raise UserError(f"{folder}: not whole right after it was written; check this disk")
    return _open_store(folder, meta, tokenizer)


def find_corpus(cache_dir: str, content_hash: str, tokenizer: Tokenizer) -> TokenizedCorpus | None:
    """Opens a stored corpus by its content; its source need not be within reach.

    Args:
      cache_dir: as for `prepare_corpus`.
      content_hash: that of the `TokenizedCorpus`.
      tokenizer: the one it was made with.

    Returns:
      None if `cache_dir` holds no such corpus.
    """
    for folder in sorted(Path(cache_dir).expanduser().glob("[!.]*")):
        meta = _whole_meta(folder)
        if meta is not None:
            corpus = _open_store(folder, meta, tokenizer)
            if corpus.content_hash == content_hash:
                return corpus
    return None


def _hash_of(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(tokenizer.to_json().encode("utf-8")).hexdigest()


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
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


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
    if config.split == "document":
        return split_by_document(spool, config.validation_fraction, seed)
    return split_by_position(spool, config.validation_fraction, tokenizer)


def _write_splits(folder: Path, plans: list[SplitPlan], spool: Spool) -> None:
    splits = {}
    for plan in plans:
        digest = hashlib.sha256()
        starts = plan.document_starts.astype("<i8")
        with open(folder / f"{plan.name}.tokens", "wb") as stream:
            for block in spool.blocks(plan.ranges):
                stream.write(block.data)
                digest.update(block.data)
        digest.update(starts.data)
        starts.tofile(folder / f"{plan.name}.starts")
        splits[plan.name] = {
            "tokens": int((plan.ranges[:, 1] - plan.ranges[:, 0]).sum()),
            "documents": len(starts),
            "num_bytes": plan.num_bytes,
            "content_hash": digest.hexdigest(),
        }
    meta = {"dtype": spool.dtype.str, "splits": splits}
    (folder / _META_FILE).write_text(json.dumps(meta, indent=2), encoding="utf-8")
    spool.path.unlink()


def _read_meta(folder: Path) -> dict[str, Any] | None:
    """What a whole store says of itself; one that is not whole is removed, to be written anew."""
    meta = _whole_meta(folder)
    if meta is None and folder.exists():
        logging.warning("%s: the tokenized corpus is damaged; it is written anew", folder)
        shutil.rmtree(folder)
    return meta


def _whole_meta(folder: Path) -> dict[str, Any] | None:
    try:
        meta: dict[str, Any] = json.loads((folder / _META_FILE).read_text(encoding="utf-8"))
        itemsize = np.dtype(meta["dtype"]).itemsize
        sizes = {}
        for name, split in meta["splits"].items():
            sizes[f"{name}.tokens"] = split["tokens"] * itemsize
            sizes[f"{name}.starts"] = split["documents"] * 8
        if all((folder / name).stat().st_size == size for name, size in sizes.items()):
            return meta
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        pass
    return None


def _open_store(folder: Path, meta: dict[str, Any], tokenizer: Tokenizer) -> TokenizedCorpus:
    splits = {name: _open_split(folder, name, meta) for name in meta["splits"]}
    hashes = [_hash_of(tokenizer), *(split.content_hash for split in splits.values())]
    content_hash = hashlib.sha256("".join(hashes).encode()).hexdigest()
    return TokenizedCorpus(tokenizer, splits["train"], splits.get("validation"), content_hash)


def _open_split(folder: Path, name: str, meta: dict[str, Any]) -> TokenSplit:
    split = meta["splits"][name]
    return TokenSplit(
        name=name,
        tokens=np.memmap(folder / f"{name}.tokens", np.dtype(meta["dtype"]), "r"),
        document_starts=np.fromfile(folder / f"{name}.starts", "<i8"),
        num_bytes=split["num_bytes"],
        content_hash=split["content_hash"],
    )


def _disk_problem(error: OSError, source: str, cache_dir: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        problem = "the disk is full; free some space there"
    else:
        problem = f"{error.strerror or error}; make it writable"
    return (
        f"{cache_dir}: {problem} or choose another folder with --config.data.cache_dir "
        f"(it was to hold the tokens of {source})"
    )
