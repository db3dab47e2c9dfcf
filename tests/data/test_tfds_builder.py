import json
import os
import shutil
from pathlib import Path

import pytest
from corpus_files import read_all, records, write
from processes import run_scripts

from simplernn_jax.config import DataConfig
from simplernn_jax.data import open_corpus, prepare_corpus
from simplernn_jax.data.tfds_builder import build_tfds
from simplernn_jax.errors import UserError

TEXTS = ["first — ä\n", "", "second", "third\n\n"]


@pytest.fixture
def jsonl(tmp_path):
    path = write(tmp_path / "in.jsonl", records(*({"bot": text} for text in TEXTS)))
    return DataConfig(source=str(path), field="bot")


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    folder = tmp_path / "datasets"
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    return str(folder)


def texts_of(source: str, **settings) -> list[str]:
    return [*read_all(source, **settings).values()]


def test_documents_come_back_in_order_by_name_version_and_folder(jsonl, data_dir):
    folder = build_tfds(jsonl, "my_books", data_dir)
    assert folder == Path(data_dir) / "my_books" / "1.0.0"
    written = [text for text in TEXTS if text]
    for name in ("my_books", "my_books:1.0.0", str(folder), str(folder.parent)):
        assert texts_of(f"tfds:{name}") == written


def test_same_tokens_as_from_the_source_itself(jsonl, data_dir, tmp_path):
    build_tfds(jsonl, "my_books", data_dir)
    direct = prepare_corpus(jsonl, 1, str(tmp_path / "cache"))
    prepared = prepare_corpus(DataConfig(source="tfds:my_books"), 1, str(tmp_path / "cache"))
    assert prepared.content_hash == direct.content_hash


def test_newest_version_is_read_and_several_configurations_are_asked_about(jsonl, data_dir):
    folder = build_tfds(jsonl, "my_books", data_dir)
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


def test_missing_field_names_those_present(jsonl, data_dir):
    build_tfds(jsonl, "my_books", data_dir)
    with pytest.raises(UserError, match=r"no field 'txt'; did you mean 'text'\?; it has text"):
        texts_of("tfds:my_books", field="txt")


def test_names_are_checked_and_nothing_is_overwritten(jsonl, data_dir):
    with pytest.raises(UserError, match="dataset name 'My Books'"):
        build_tfds(jsonl, "My Books", data_dir)
    with pytest.raises(UserError, match="not UTF-8"):
        build_tfds(jsonl, "my_books", os.fsdecode(os.fsencode(data_dir) + b"\xff"))
    build_tfds(jsonl, "my_books", data_dir)
    with pytest.raises(UserError, match="exists already"):
        build_tfds(jsonl, "my_books", data_dir)


def test_bad_source_is_rejected_and_can_be_fixed(jsonl, data_dir, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        build_tfds(DataConfig(source=str(tmp_path / "nowhere")), "my_books", data_dir)
    path = Path(jsonl.source)
    good = path.read_text(encoding="utf-8")
    path.write_text(good + "no record\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"in\.jsonl:5: not JSON"):
        build_tfds(jsonl, "my_books", data_dir)
    with pytest.raises(UserError, match="not prepared"):
        texts_of("tfds:my_books")
    path.write_text(good, encoding="utf-8")
    build_tfds(jsonl, "my_books", data_dir)


def test_format_that_needs_tensorflow_is_named(jsonl, data_dir):
    folder = build_tfds(jsonl, "my_books", data_dir)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="prepared as tfrecord, which needs TensorFlow"):
        texts_of("tfds:my_books")


@pytest.mark.parametrize(
    "name", ["dataset_info.json", "my_books-train.array_record-00000-of-00001"]
)
@pytest.mark.parametrize("size", [0, 100])
def test_truncated_files_are_one_line(jsonl, data_dir, name, size):
    folder = build_tfds(jsonl, "my_books", data_dir)
    os.truncate(folder / name, size)
    with pytest.raises(UserError, match=r"my_books/1\.0\.0.*: TFDS cannot read it \("):
        texts_of("tfds:my_books")


def test_script_makes_a_dataset_or_gives_one_line(jsonl, data_dir):
    command = ["scripts/build_tfds.py", f"--source={jsonl.source}", "--name=my_books"]
    wrong, (code, text, errors) = run_scripts(
        (*command, "--field=text"), (*command, "--field=bot"), TFDS_DATA_DIR=data_dir
    )
    assert wrong.code == 2
    assert "error: " in wrong.errors
    assert "in.jsonl:1: no field 'text'; it has bot: name the one with the text" in wrong.errors
    assert "Traceback" not in wrong.errors
    assert code == 0, errors
    assert "Generating" not in errors  # no progress bar
    assert "--config.data.source=tfds:" in text
    assert texts_of("tfds:my_books") == [text for text in TEXTS if text]


def test_other_datasets_are_no_text_and_a_source_without_text_is_rejected(tmp_path):
    write(tmp_path / "in" / "a.txt", "a")
    for name in ("first", "second"):
        folder = build_tfds(
            DataConfig(source=str(tmp_path / "in")), name, str(tmp_path / "in" / "sets")
        )
        assert texts_of(f"tfds:{folder}") == ["a"]
    with pytest.raises(UserError, match="holds the text too; choose another --data_dir, or a glob"):
        build_tfds(DataConfig(source=str(tmp_path / "in")), "third", str(tmp_path / "in"))
    source = write(tmp_path / "empty.jsonl", records({"text": ""}))
    with pytest.raises(UserError, match=r"empty\.jsonl: no text in it; choose another source"):
        build_tfds(DataConfig(source=str(source)), "third", str(tmp_path / "sets"))
