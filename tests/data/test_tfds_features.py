"""A prepared folder is checked before TFDS reads it."""

import json
import sys

import pytest
from odd_files import put_odd_file

from simplernn_jax.config import DataConfig
from simplernn_jax.data import open_corpus
from simplernn_jax.data.prepared_dataset import check_folder
from simplernn_jax.errors import UserError

OWN = "tensorflow_datasets.core.features."
FOREIGN = "somebodys_module.Feature"


def feature(name, **content):
    return {"pythonClassName": name, **content}


def dictionary(**features):
    name = OWN + "features_dict.FeaturesDict"
    return feature(name, featuresDict={"features": features})


TEXT = feature(OWN + "text_feature.Text", text={})
SEQUENCE = OWN + "sequence_feature.Sequence"


def write(folder, features):
    (folder / "features.json").write_text(json.dumps(features))
    (folder / "dataset_info.json").write_text('{"name": "some", "version": "1.0.0"}')


@pytest.mark.parametrize(
    "features",
    [
        TEXT,
        dictionary(text=TEXT, type=feature(SEQUENCE, sequence={"feature": TEXT}), description=TEXT),
        {"type": OWN + "text_feature.Text", "content": "{}"},
        feature(OWN + "text_feature.Text", description="{not JSON}", text={}),
    ],
)
def test_features_of_tfds_are_accepted(tmp_path, features):
    write(tmp_path, features)
    check_folder(tmp_path)


@pytest.mark.parametrize(
    "features",
    [
        feature(FOREIGN),
        {"python_class_name": FOREIGN},
        {"type": FOREIGN, "content": {}},
        feature("tensorflow_datasets_of_mine.Feature"),
        dictionary(text=TEXT, other=dictionary(inner=feature(FOREIGN))),
        feature(SEQUENCE, sequence={"feature": feature(FOREIGN)}),
        feature(SEQUENCE, jsonFeature={"json": json.dumps({"a": [{"type": FOREIGN}]})}),
        {"type": SEQUENCE, "content": " " + json.dumps({"feature": feature(FOREIGN)})},
    ],
)
def test_a_foreign_feature_class_is_rejected_before_its_module_is_imported(
    tmp_path, monkeypatch, features
):
    (tmp_path / "somebodys_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "some" / "1.0.0"
    folder.mkdir(parents=True)
    write(folder, features)
    with pytest.raises(UserError, match=r"features\.json: the feature class '.* is not part of"):
        list(open_corpus(DataConfig(source=f"tfds:{folder}")).documents())
    assert "somebodys_module" not in sys.modules


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff", "not JSON"),
        (json.dumps("[" * 100_000).encode(), "not JSON"),
        (None, "No such file"),
    ],
)
def test_damaged_features_are_one_line(tmp_path, content, problem):
    if content is not None:
        (tmp_path / "features.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"features\.json: {problem}"):
        check_folder(tmp_path)


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json", "x.array_record-0-of-1"])
def test_endless_files_are_not_read(tmp_path, name):
    for kind in ("fifo", "endless"):
        write(tmp_path, TEXT)
        put_odd_file(kind, tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: not a regular file"):
            check_folder(tmp_path)
        (tmp_path / name).unlink()
