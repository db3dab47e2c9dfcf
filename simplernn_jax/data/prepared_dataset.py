"""Prepared TFDS datasets, read as a corpus and built from another one, without TensorFlow.

Its folder is checked before TFDS reads it, because what TFDS reads can run code.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simplernn_jax.config import DataConfig
from simplernn_jax.data.documents import Corpus, Record
from simplernn_jax.data.record_files import RecordFiles, missing_field
from simplernn_jax.data.source_files import SourceFile
from simplernn_jax.errors import UserError, library_errors, one_line
from simplernn_jax.files import read_file

_INFO = "dataset_info.json"
_FEATURES = "features.json"
_TRUSTED = "tensorflow_datasets."
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
"""Keys of class names: the two spellings of protobuf, and the one before TFDS 4.3."""


def default_data_dir() -> Path:
    """Folder of prepared datasets: ``TFDS_DATA_DIR``, or ``~/tensorflow_datasets``."""
    return Path(os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))


def find_prepared(name: str) -> Path:
    """Find the folder of a prepared dataset by its path or by ``NAME[/CONFIG][:VERSION]``.

    Names are looked up under `default_data_dir` and not by TFDS itself, whose bundled builders
    would try the network for minutes first. Of several versions, the newest is taken.

    Raises:
      UserError: nothing of that name is prepared, or several are.
    """
    data_dir = default_data_dir()
    for root in (Path(os.path.expanduser(name)), data_dir / name.replace(":", "/")):
        found = {info.parent for depth in ("", "*/", "*/*/") for info in root.glob(depth + _INFO)}
        if len(parents := {folder.parent for folder in found}) > 1:
            names = ", ".join(str(parent.relative_to(root)) for parent in sorted(parents))
            raise UserError(f"tfds:{name}: several are prepared in {root}; choose one of {names}")
        if found:
            return max(found, key=_version)
    raise UserError(
        f"tfds:{name}: not prepared in {data_dir} (TFDS_DATA_DIR names another place); create one "
        "from your own text with python scripts/build_tfds.py, or, since builders bundled with "
        "TFDS need TensorFlow, prepare it elsewhere with file_format='array_record' and copy it"
    )


def _version(folder: Path) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in folder.name.split("."))


class PreparedDataset(RecordFiles):
    """The ``train`` split of a dataset in array_record files: each example is a document."""

    kind = "tfds"

    def __init__(self, folder: Path, config: DataConfig) -> None:
        files = [
            SourceFile(path.name, str(path)) for path in sorted(folder.iterdir()) if path.is_file()
        ]
        super().__init__(files, config)
        self._folder = folder

    def records(self) -> Iterator[tuple[Record, int]]:
        """See `Corpus.records`."""
        import tensorflow_datasets as tfds

        self._begin()
        file = SourceFile(str(self._folder), str(self._folder))
        with library_errors(f"{self._folder}: TFDS cannot read it", "prepare the dataset again"):
            check_folder(self._folder)
            builder = tfds.builder_from_directory(str(self._folder))
            fields = list(builder.info.features)
            if self._field not in fields:
                raise UserError(f"{self._folder}: {missing_field(self._field, fields)}")
            source = builder.as_data_source("train")
            for index in range(len(source)):
                value = source[index][self._field]
                self.bytes_read = self.total_bytes * (index + 1) // len(source)
                size = len(value) if isinstance(value, str | bytes) else 0
                yield (file, f": example {index}", value), size


def check_folder(folder: Path) -> None:
    """Check that reading a prepared dataset runs no foreign code.

    TFDS imports the module of every feature class that ``features.json`` names.

    Raises:
      UserError: a feature class is not one of TFDS's own, or ``features.json`` is corrupted.
    """
    path = folder / _FEATURES
    with library_errors(f"{path}: cannot be read", "prepare the dataset again"):
        for name in _class_names(json.loads(read_file(path).decode())):
            if not name.startswith(_TRUSTED):
                raise UserError(
                    f"{path}: the feature class {name!r} is not part of TFDS, and reading it would "
                    "run its code; prepare the dataset again with features of TFDS"
                )


def _class_names(value: Any) -> Iterator[str]:
    """Yield all class names, also those in strings that hold JSON themselves."""
    if isinstance(value, list):
        for item in value:
            yield from _class_names(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in _CLASS_KEYS and isinstance(item, str):
                yield item
            else:
                yield from _class_names(item)
    elif isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            inner = json.loads(value)
        except ValueError:
            return
        yield from _class_names(inner)


def build_tfds(corpus: Corpus, source: str, name: str, data_dir: str) -> Path:
    """Prepare ``data_dir/name/1.0.0``, which the source ``tfds:name`` or that path then names.

    Its split ``train`` has the documents of a corpus in source order, as the ``text`` of examples.
    Each of them is held in memory while it is written, unlike a document of a text file.

    Raises:
      UserError: the name is invalid, the dataset exists, or the corpus is unusable or has no text.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_builders.adhoc_builder import AdhocBuilder

    class Builder(AdhocBuilder, skip_registration=True):  # type: ignore[call-arg]
        """A builder that does not import TensorFlow for the type of its splits."""

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return dict(self._split_datasets)

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(
            f"dataset name {name!r}: use a lower-case letter, then such letters, digits and _"
        )
    builder = Builder(
        name=name,
        version="1.0.0",
        features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
        split_datasets={"train": _examples(corpus, source)},
        data_dir=data_dir,
        description=one_line(f"Text of {source}."),
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
