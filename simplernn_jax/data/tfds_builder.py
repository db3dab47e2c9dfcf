"""TFDS builder: any corpus as an array_record dataset, without TensorFlow or a network."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_builders.adhoc_builder import AdhocBuilder

from simplernn_jax.config import DataConfig
from simplernn_jax.data.corpora import open_corpus
from simplernn_jax.data.documents import Corpus
from simplernn_jax.errors import UserError, one_line


class _Builder(AdhocBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A builder that does not import TensorFlow for the type of its splits."""

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return dict(self._split_datasets)


def build_tfds(source: DataConfig, name: str, data_dir: str) -> Path:
    """Prepare ``data_dir/name/1.0.0``, which the source ``tfds:name`` or that path then names.

    Its split ``train`` has the documents of a corpus in source order, as the ``text`` of examples.
    Each of them is held in memory while it is written, unlike a document of a text file.

    Raises:
      UserError: the name is invalid, the dataset exists, or the corpus is unusable or has no text.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(
            f"dataset name {name!r}: use a lower-case letter, then such letters, digits and _"
        )
    corpus = open_corpus(source, exclude=[data_dir])
    builder = _Builder(
        name=name,
        version="1.0.0",
        features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
        split_datasets={"train": _examples(corpus, source.source)},
        data_dir=data_dir,
        description=one_line(f"Text of {source.source}."),
        file_format="array_record",
        disable_shuffling=True,
    )
    folder = Path(builder.data_dir)
    if folder.exists():
        raise UserError(f"{folder}: exists already; choose another --name or remove it")
    tfds.disable_progress_bar()
    builder.download_and_prepare()
    return folder


def _examples(corpus: Corpus, source: str) -> Iterator[tuple[int, dict[str, str]]]:
    index, texts = 0, list[str]()
    for _, piece in corpus.pieces():
        texts.append(piece.text)
        if piece.ends:
            yield index, {"text": "".join(texts)}
            index, texts = index + 1, []
    if not index:
        raise UserError(f"{source}: no text in it; choose another source")
