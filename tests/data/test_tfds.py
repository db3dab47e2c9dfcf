"""TFDS datasets: built from a corpus, found, checked before TFDS reads them, and read."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from processes import run_scripts
from small_data import read_all, records, write

from simplernn_jax.config import DataConfig
from simplernn_jax.data import open_corpus, prepare_corpus
from simplernn_jax.data.prepared_dataset import build_tfds, check_folder
from simplernn_jax.errors import UserError

TEXTS = ["first — ä\n", "", "second", "third\n\n"]
WRITTEN = [text for text in TEXTS if text]


@pytest.fixture
def jsonl(tmp_path):
    path = write(tmp_path / "in.jsonl", records(*({"bot": text} for text in TEXTS)))
    return DataConfig(source=str(path), field="bot")


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    folder = tmp_path / "datasets"
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    return str(folder)


def build(config, name, data_dir):
    corpus = open_corpus(config, exclude=[data_dir])
    return build_tfds(corpus, config.source, name, data_dir)


def texts_of(source: str, **settings) -> list[str]:
    return [*read_all(source, **settings).values()]


def test_documents_come_back_in_order_by_name_version_and_folder(jsonl, data_dir, tmp_path):
    folder = build(jsonl, "my_books", data_dir)
    assert folder == Path(data_dir) / "my_books" / "1.0.0"
    for name in ("my_books", "my_books:1.0.0", str(folder), str(folder.parent)):
        assert texts_of(f"tfds:{name}") == WRITTEN
    direct = prepare_corpus(jsonl, 1, str(tmp_path / "cache"))
    prepared = prepare_corpus(DataConfig(source="tfds:my_books"), 1, str(tmp_path / "cache"))
    assert prepared.content_hash == direct.content_hash
    with pytest.raises(UserError, match=r"no field 'txt'; it has text"):
        texts_of("tfds:my_books", field="txt")


def test_newest_version_is_read_and_several_configurations_are_asked_about(jsonl, data_dir):
    folder = build(jsonl, "my_books", data_dir)
    fingerprint = open_corpus(DataConfig(source="tfds:my_books")).fingerprint()
    shutil.copytree(folder, folder.with_name("1.0.10"))
    shutil.copytree(folder, folder.with_name("1.0.9"))
    shutil.copy(folder / "features.json", folder.with_name("1.0.10") / "extra.json")
    assert open_corpus(DataConfig(source="tfds:my_books")).fingerprint() != fingerprint
    both = folder.parent.with_name("both")
    for config in ("large", "small"):
        shutil.copytree(folder, both / config / "1.0.0")
    assert texts_of("tfds:both/small") == texts_of("tfds:my_books")
    with pytest.raises(UserError, match=r"tfds:both: several are prepared .* large, small"):
        texts_of("tfds:both")


def test_names_are_checked_and_nothing_is_overwritten(jsonl, data_dir, tmp_path):
    with pytest.raises(UserError, match="dataset name 'My Books'"):
        build(jsonl, "My Books", data_dir)
    write(tmp_path / "in" / "a.txt", "a")
    source = DataConfig(source=str(tmp_path / "in"))
    for name in ("first", "second"):  # other datasets are no text
        folder = build(source, name, str(tmp_path / "in" / "sets"))
        assert texts_of(f"tfds:{folder}") == ["a"]
    with pytest.raises(UserError, match="exists already"):
        build(source, "first", str(tmp_path / "in" / "sets"))


def test_truncated_files_are_one_line(jsonl, data_dir):
    folder = build(jsonl, "my_books", data_dir)
    for name in ("my_books-train.array_record-00000-of-00001", "dataset_info.json"):
        os.truncate(folder / name, 100)
        with pytest.raises(UserError, match=r"my_books/1\.0\.0.*: TFDS cannot read it \("):
            texts_of("tfds:my_books")


def test_script_makes_a_dataset(jsonl, data_dir):
    command = ["scripts/build_tfds.py", f"--source={jsonl.source}", "--name=my_books"]
    ((code, text, errors),) = run_scripts((*command, "--field=bot"), TFDS_DATA_DIR=data_dir)
    assert code == 0, errors
    assert "Generating" not in errors  # no progress bar
    assert "--config.data.source=tfds:" in text
    assert texts_of("tfds:my_books") == WRITTEN


OWN = "tensorflow_datasets.core.features."
FOREIGN = "somebodys_module.Feature"


def feature(name, **content):
    return {"pythonClassName": name, **content}


def dictionary(**features):
    name = OWN + "features_dict.FeaturesDict"
    return feature(name, featuresDict={"features": features})


TEXT = feature(OWN + "text_feature.Text", text={})
SEQUENCE = OWN + "sequence_feature.Sequence"


def write_features(folder, features):
    (folder / "features.json").write_text(json.dumps(features))
    (folder / "dataset_info.json").write_text('{"name": "some", "version": "1.0.0"}')


@pytest.mark.parametrize(
    "features",
    [
        dictionary(text=TEXT, type=feature(SEQUENCE, sequence={"feature": TEXT}), description=TEXT),
        feature(OWN + "text_feature.Text", description="{not JSON}", text={}),
    ],
)
def test_features_of_tfds_are_accepted(tmp_path, features):
    write_features(tmp_path, features)
    check_folder(tmp_path)


@pytest.mark.parametrize(
    "features",
    [
        {"python_class_name": FOREIGN},
        feature("tensorflow_datasets_of_mine.Feature"),
        dictionary(text=TEXT, other=dictionary(inner=feature(FOREIGN))),
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
    write_features(folder, features)
    with pytest.raises(UserError, match=r"features\.json: the feature class '.* is not part of"):
        list(open_corpus(DataConfig(source=f"tfds:{folder}")).pieces())
    assert "somebodys_module" not in sys.modules


def test_damaged_features_are_one_line(tmp_path):
    (tmp_path / "features.json").write_bytes(b"[" * 100_000)
    with pytest.raises(UserError, match=r"features\.json: cannot be read"):
        check_folder(tmp_path)
