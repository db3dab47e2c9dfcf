"""A tokenized corpus: its tokenizer and its splits, of one source or of a mixture."""

import dataclasses
import json
from collections.abc import Sequence

import numpy as np

from simplernn_jax.data.sharded_array import ShardedArray, joined, shards_of
from simplernn_jax.data.store_folder import TokenSplit
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.errors import counted
from simplernn_jax.files import sha256_hex

_FEW_TOKENS = 10_000
"""Validation tokens below which the loss is noisy: its standard error is some hundredths."""


@dataclasses.dataclass(frozen=True)
class MixedSplit(TokenSplit):
    """Union of the splits of several sources, whose documents follow one another."""

    sources: tuple[str, ...] = ()
    parts: tuple[TokenSplit, ...] = ()
    """The split of each source, with its source before its name."""
    weights: tuple[float, ...] = ()
    """Probability of each source in training; their sum is 1."""


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

    @property
    def summary(self) -> str:
        """``12,345 training tokens in 3 documents; no validation tokens``."""
        train = _size(self.train, "training token")
        if self.validation is None:
            return f"{train}; no validation tokens"
        return f"{train}; {_size(self.validation, 'validation token')}"

    def warning(self, validation_fraction: float) -> str:
        """Warn of a validation split that is small, or far larger than asked; empty if neither."""
        if self.validation is None:
            return ""
        if len(self.validation.tokens) < _FEW_TOKENS:
            return (
                f"fewer than {_FEW_TOKENS:,} validation tokens make the loss noisy; use more text, "
                "or hold out more with --config.data.validation_fraction"
            )
        total = len(self.train.tokens) + len(self.validation.tokens)
        if len(self.validation.tokens) > max(2 * validation_fraction, 0.3) * total:
            return (
                f"{len(self.validation.tokens) / total:.0%} of the text is held out for "
                "validation, since a long document is; --config.data.split=position holds out the "
                "end of the text instead"
            )
        return ""


def _size(split: TokenSplit, noun: str) -> str:
    documents = counted(len(split.document_starts), "document")
    return f"{counted(len(split.tokens), noun)} in {documents}"


def hash_splits(tokenizer: Tokenizer, splits: Sequence[str]) -> str:
    """Hash a tokenizer and the content hashes of the splits of one source."""
    return sha256_hex("".join([hash_of(tokenizer), *splits]))


def hash_of(tokenizer: Tokenizer) -> str:
    """SHA-256 of a tokenizer."""
    return sha256_hex(tokenizer.to_json())


def of_splits(tokenizer: Tokenizer, splits: Sequence[TokenSplit]) -> TokenizedCorpus:
    """Create the corpus of one source from its one or two splits."""
    by_name = {split.name: split for split in splits}
    whole = hash_splits(tokenizer, [split.content_hash for split in splits])
    return TokenizedCorpus(tokenizer, by_name["train"], by_name.get("validation"), whole)


def of_mixture(
    corpora: Sequence[TokenizedCorpus], sources: Sequence[str], weights: Sequence[float]
) -> TokenizedCorpus:
    """Create the corpus of a mixture from those of its sources, all of one tokenizer."""
    validation = [
        (corpus.validation, source, weight)
        for corpus, source, weight in zip(corpora, sources, weights, strict=True)
        if corpus.validation is not None
    ]
    parts = [[corpus.content_hash for corpus in corpora], list(weights)]
    return TokenizedCorpus(
        corpora[0].tokenizer,
        _union("train", [corpus.train for corpus in corpora], sources, weights),
        _union("validation", *zip(*validation, strict=True)) if validation else None,
        sha256_hex(json.dumps(parts)),
    )


def _union(
    name: str, splits: Sequence[TokenSplit], sources: Sequence[str], weights: Sequence[float]
) -> MixedSplit:
    sizes = np.array([len(split.tokens) for split in splits])
    offsets = np.cumsum(sizes) - sizes
    starts = [split.document_starts + at for split, at in zip(splits, offsets, strict=True)]
    targets = None
    if any(split.targets is not None for split in splits):
        targets = joined([shard for split in splits for shard in shards_of(_targets(split))])
    return MixedSplit(
        name,
        joined([shard for split in splits for shard in shards_of(split.tokens)]),
        np.concatenate(starts),
        sum(split.num_bytes for split in splits),
        sha256_hex("".join(split.content_hash for split in splits)),
        targets,
        tuple(sources),
        tuple(
            dataclasses.replace(split, name=f"{source} {split.name}")
            for split, source in zip(splits, sources, strict=True)
        ),
        tuple(weights),
    )


def _targets(split: TokenSplit) -> np.ndarray | ShardedArray:
    """Return whether each token is a target, also of a split in which all are."""
    if split.targets is not None:
        return split.targets
    targets = np.ones(len(split.tokens), np.bool_)
    targets[split.document_starts] = False
    return targets
