"""Checks of a prepared TFDS folder before TFDS reads it, because what TFDS reads can run code."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simplernn_jax.errors import UserError
from simplernn_jax.files import read_file

_FEATURES = "features.json"
_TRUSTED = "tensorflow_datasets."
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
"""What precedes the name of a class: as the two spellings of protobuf, and before TFDS 4.3."""


def check_folder(folder: Path) -> None:
    """Check that reading a prepared data set waits for nothing and runs no foreign code.

    TFDS imports the module of every feature class that ``features.json`` names.

    Raises:
      UserError: a feature class is not one of TFDS's own, ``features.json`` is damaged, or the
        folder holds something else than regular files and folders.
    """
    for path in sorted(folder.iterdir()):
        if not (path.is_file() or path.is_dir()):
            raise UserError(f"{path}: not a regular file; remove it or prepare the data set again")
    path = folder / _FEATURES
    try:
        for name in _class_names(json.loads(read_file(path).decode())):
            if not name.startswith(_TRUSTED):
                raise UserError(
                    f"{path}: the feature class {name!r} is not part of TFDS, and reading it would "
                    "run its code; prepare the data set again with features of TFDS"
                )
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; prepare the data set again") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); prepare the data set again") from error


def _class_names(value: Any) -> Iterator[str]:
    """All class names, also those in strings that hold JSON themselves."""
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
