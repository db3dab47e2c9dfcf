"""A prepared TFDS data set as a corpus, read without TensorFlow."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simplernn_jax.data.documents import Document, text_pieces
from simplernn_jax.data.source_files import SourceFile, files_fingerprint, total_size
from simplernn_jax.data.tfds_features import check_folder
from simplernn_jax.errors import UserError, nearest_name

_INFO = "dataset_info.json"


def default_data_dir() -> Path:
    """Where TFDS keeps prepared data sets: ``TFDS_DATA_DIR``, or ``~/tensorflow_datasets``."""
    return Path(os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))


def find_prepared(name: str) -> Path:
    """The folder of a prepared data set: itself a folder, or ``NAME[/CONFIG][:VERSION]``.

    Names are looked for under `default_data_dir`. TFDS itself is
    not asked: a builder it bundles would try the network for minutes first.

    Raises:
      UserError: nothing of that name is prepared, or several are.
    """
    data_dir = default_data_dir()
    for root in (Path(os.path.expanduser(name)), data_dir / name.replace(":", "/")):
        found = sorted(
            {info.parent for depth in ("", "*/", "*/*/") for info in root.glob(depth + _INFO)}
        )
        if not found:
            continue
        parents = {folder.parent for folder in found}
        if len(parents) > 1:
            names = ", ".join(str(parent.relative_to(root)) for parent in sorted(parents))
            raise UserError(f"tfds:{name}: several are prepared in {root}; choose one of {names}")
        return max(found, key=_version)
    raise UserError(
        f"tfds:{name}: not prepared in {data_dir} (TFDS_DATA_DIR names another place); "
        "make a data set from your own text with scripts/build_tfds.py, or, since builders bundled "
        "with TFDS need TensorFlow and a network, prepare it where those are with "
        "file_format='array_record' and copy it here"
    )


@contextlib.contextmanager
def _readable(where: str) -> Iterator[None]:
    """Turns what TFDS raises for damaged files, which can be anything, into a `UserError`."""
    try:
        yield
    except NotImplementedError:  # a file format that needs TensorFlow
        raise
    except Exception as error:
        raise UserError(
            f"{where}: TFDS cannot read it ({type(error).__name__}: {error}); prepare the data set "
            "again"
        ) from error


def _version(folder: Path) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in folder.name.split("."))


class PreparedDataset:
    """The ``train`` split of a data set in array_record files: each example is a document."""

    def __init__(self, folder: Path, field: str, encoding_errors: str) -> None:
        self._folder = folder
        self._field = field
        self._encoding_errors = encoding_errors
        self._files = [
            SourceFile(path.name, str(path)) for path in sorted(folder.iterdir()) if path.is_file()
        ]
        self.total_bytes = total_size(self._files)
        self.bytes_read = 0

    def fingerprint(self) -> str:
        """See `Corpus.fingerprint`."""
        return files_fingerprint(self._files, kind="tfds", field=self._field)

    def documents(self) -> Iterator[Document]:
        """See `Corpus.documents`."""
        self.bytes_read = 0
        source = self._open()
        for index in range(len(source)):
            where = f"{self._folder}: example {index}"
            with _readable(where):
                value = source[index][self._field]
            text = self._text(value, where)
            self.bytes_read = self.total_bytes * (index + 1) // len(source)
            yield Document(where, text_pieces(text))

    def _open(self) -> Any:
        import tensorflow_datasets as tfds

        check_folder(self._folder)
        with _readable(str(self._folder)):
            builder = tfds.builder_from_directory(str(self._folder))
        splits = list(builder.info.splits)
        if "train" not in splits:
            raise UserError(f"{self._folder}: no split train; it has {', '.join(splits)}")
        fields = list(builder.info.features)
        if self._field not in fields:
            raise UserError(
                f"{self._folder}: no field {self._field!r}{nearest_name(self._field, fields)}; it "
                f"has {', '.join(fields)}: say which with --config.data.field=NAME"
            )
        try:
            with _readable(str(self._folder)):
                source = builder.as_data_source("train")
                len(source)  # opens the files
            return source
        except NotImplementedError as error:
            raise UserError(
                f"{self._folder}: prepared as {builder.info.file_format.value}, which needs "
                "TensorFlow; prepare it again with file_format='array_record'"
            ) from error

    def _text(self, value: Any, where: str) -> str:
        if isinstance(value, str):
            return value
        if not isinstance(value, bytes):
            raise UserError(
                f"{where}: field {self._field!r} is of type {type(value).__name__}, not text; "
                "choose another with --config.data.field=NAME"
            )
        try:
            return value.decode("utf-8", self._encoding_errors)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}: invalid UTF-8 at byte {error.start} of field {self._field!r}; prepare "
                "it again from UTF-8, or run with --config.data.encoding_errors=replace"
            ) from error
