"""Build a TFDS dataset of array_record files from text, JSON, CSV or Parquet files.

    python scripts/build_tfds.py --source "books/*.txt" --name my_books
    python scripts/train.py --config configs/base.py --workdir DIR \\
        --config.data.source=tfds:my_books

Neither TensorFlow nor a network is needed, here or when the dataset is read.
"""

import bootstrap

if __name__ == "__main__":
    bootstrap.start()

from absl import flags

from simplernn_jax.cli.command_line import expand_path, run
from simplernn_jax.config import ENCODING_ERRORS, DataConfig
from simplernn_jax.data.corpora import open_corpus
from simplernn_jax.data.prepared_dataset import build_tfds, default_data_dir

_SOURCE = flags.DEFINE_string(
    "source", None, "File, folder or glob of text, records or rows; or stdlib.", required=True
)
_NAME = flags.DEFINE_string("name", None, "Name of the new dataset.", required=True)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Folder of datasets; by default TFDS_DATA_DIR or ~/tensorflow_datasets."
)
_FIELD = flags.DEFINE_string("field", "text", "Field of a record that holds the text.")
_ENCODING_ERRORS = flags.DEFINE_enum(
    "encoding_errors",
    "strict",
    ENCODING_ERRORS,
    "Handling of invalid UTF-8: stop, or replace with U+FFFD.",
)
_MAX_MALFORMED_RECORDS = flags.DEFINE_integer(
    "max_malformed_records", 0, "Maximum number of malformed records to skip.", lower_bound=0
)


def main() -> None:
    """Build the dataset and print how to train on it."""
    source = DataConfig(
        source=_SOURCE.value,
        field=_FIELD.value,
        encoding_errors=_ENCODING_ERRORS.value,
        max_malformed_records=_MAX_MALFORMED_RECORDS.value,
    )
    data_dir = expand_path(_DATA_DIR.value or str(default_data_dir()), "data_dir")
    corpus = open_corpus(source, exclude=[data_dir])  # no other datasets
    folder = build_tfds(corpus, source.source, _NAME.value, data_dir)
    print(f"{folder}: train on it with --config.data.source=tfds:{folder}")


if __name__ == "__main__":
    run(main)
