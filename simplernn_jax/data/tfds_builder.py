"""TFDS builder: any corpus as an array_record dataset, without TensorFlow or a network."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from simplernn_jax.config import DataConfig
from simplernn_jax.data.corpora import open_corpus
from simplernn_jax.data.documents import Corpus
from simplernn_jax.errors import UserError, one_line

FIELD = "text"


class TextDataset(  # type: ignore[call-arg]  # the base class takes the keyword
    tfds.core.GeneratorBasedBuilder, skip_registration=True
):
    """Documents of a corpus, in source order, as the ``text`` of examples of a split ``train``.

    A whole example is held in memory while it is written, unlike a document of a text file.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, corpus: Corpus, name: str, **kwargs: Any) -> None:
        self._corpus, self._source = corpus, name
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=one_line(f"Text of {self._source}."),
            features=tfds.features.FeaturesDict({FIELD: tfds.features.Text()}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
        has_text = False
        for index, document in enumerate(self._corpus.documents()):
            text = "".join(piece.text for piece in document.pieces)
            if text:
                has_text = True
                yield index, {FIELD: text}
        if not has_text:
            raise UserError(f"{self._source}: no text in it; choose another source")


def build_tfds(source: DataConfig, name: str, data_dir: str) -> Path:
    """Prepare ``data_dir/name/1.0.0``, which the source ``tfds:name`` or that path then names.

    Raises:
      UserError: the name is invalid, the dataset exists, or the corpus is unusable or has no text.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(
            f"dataset name {name!r}: use a lower-case letter, then such letters, digits and _"
        )
    # Before anything is written, and without other datasets.
    corpus = open_corpus(source, exclude=[data_dir])
    builder_class = type(name, (TextDataset,), {"name": name}, skip_registration=True)
    builder = builder_class(corpus, source.source, data_dir=data_dir, file_format="array_record")
    folder = Path(builder.data_dir)
    if folder.exists():
        raise UserError(f"{folder}: exists already; choose another --name or remove it")
    tfds.disable_progress_bar()
    builder.download_and_prepare()
    return folder
