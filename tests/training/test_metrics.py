"""The metrics of a run on disk, over interruptions and damage."""

import errno
import io
import json
import os
import time
from pathlib import Path

import pytest
from odd_files import ODD_FILES
from processes import ROOT, run_python
from tensorboardX.record_writer import RecordWriter

from simplernn_jax.training import metrics as metrics_module
from simplernn_jax.training.metrics import (
    MAX_LINE_BYTES,
    MetricsWriter,
    decode_lines,
    encode,
    read_metrics,
)


def write(workdir, first_step, *steps, loss=1.5):
    writer = MetricsWriter(str(workdir), first_step)
    for step in steps:
        writer.write(step, "train", loss=loss, skipped_updates=0)
    writer.close()


def steps_in(workdir):
    return [row["step"] for row in read_metrics(str(workdir))]


def test_rows_are_json_objects_with_step_kind_and_time_and_tensorboard_events(tmp_path):
    before, workdir = time.time(), tmp_path / "base"
    workdir.mkdir()
    assert read_metrics(str(workdir)) == []
    writer = MetricsWriter(str(workdir), 0)
    writer.write(3, "train", loss=1.5)
    writer.write(3, "sample", text="zwölf\u2028\n")
    rows = read_metrics(str(workdir))  # readable while the run writes
    writer.close()
    assert read_metrics(str(workdir)) == rows
    # TensorBoard names a run by the path of this file's folder below --logdir.
    (path,) = tmp_path.rglob("events.out.tfevents.*")
    assert path.parent.relative_to(tmp_path) == Path("base", "tensorboard")
    assert b"train/loss" in path.read_bytes()
    assert b"sample/text" in path.read_bytes()
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        assert len(json.loads(line).pop("crc32")) == 8
    assert all(abs(row.pop("wall_time") - before) < 3600 for row in rows)
    assert rows == [
        {"step": 3, "kind": "train", "loss": 1.5},
        {"step": 3, "kind": "sample", "text": "zwölf\u2028\n"},
    ]


def test_a_resume_drops_rows_after_the_checkpoint_and_repeats_none(tmp_path):
    write(tmp_path, 0, 5, 10, 15)
    write(tmp_path, 10, 10, 12, loss=2.5)
    assert steps_in(tmp_path) == [5, 10, 12]
    assert read_metrics(str(tmp_path))[1]["loss"] == 1.5
    write(tmp_path, 0)
    assert steps_in(tmp_path) == []


def test_a_resume_keeps_evaluations_of_other_tokens_apart(tmp_path):
    for predictions in (100, 100, 5000):
        writer = MetricsWriter(str(tmp_path), 0 if not steps_in(tmp_path) else 10)
        writer.write(10, "validation", loss=1.5, predictions=predictions)
        writer.close()
    assert [row["predictions"] for row in read_metrics(str(tmp_path))] == [100, 5000]


def test_a_line_truncated_by_a_crash_is_left_out_and_later_ones_are_intact(tmp_path):
    write(tmp_path, 0, 5, 10)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    assert steps_in(tmp_path) == [5]
    write(tmp_path, 10, 15)
    assert steps_in(tmp_path) == [5, 15]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes().startswith(b'{"step": 10, ')
    for line in path.read_text(encoding="utf-8").splitlines():
        json.loads(line)


def test_numbers_that_are_not_finite_are_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(str(tmp_path), 1)
    writer.write(2, "train", loss=float("nan"))
    writer.write(2, "train", loss=float("inf"), gradient_norm=0.5)
    writer.close()
    assert "NaN" not in path.read_text()
    assert "Infinity" not in path.read_text()
    assert [(row["loss"], row.get("gradient_norm")) for row in read_metrics(str(tmp_path))] == [
        (None, None),
        (None, 0.5),
    ]


def test_training_time_resumes_from_the_last_row_that_is_kept(tmp_path):
    writer = MetricsWriter(str(tmp_path), 0)
    for step, seconds in ((5, 1.5), (10, 2.5), (15, 3.5)):
        writer.write(step, "train", seconds=seconds)
    writer.close()
    assert writer.seconds == 0
    writer = MetricsWriter(str(tmp_path), 10)
    writer.close()
    assert writer.seconds == 2.5


ROWS = [
    {"step": 5, "kind": "train", "loss": 3.25, "tokens": 70, "learning_rate": 1e-05},
    {"step": 5, "kind": "sample", "text": "a\u20ac"},
    {"step": 10, "kind": "validation", "loss": None},
]


def test_no_bit_flip_changes_a_row_or_loses_one_unseen():
    whole = b"".join(map(encode, ROWS))
    assert [row for _, row in decode_lines(io.BytesIO(whole))] == ROWS
    for position in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            found = [row for _, row in decode_lines(io.BytesIO(damaged))]
            rows = [row for row in found if row is not None]
            assert all(row in ROWS for row in rows), (position, bit)
            assert len(rows) == 3 or None in found, (position, bit)


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b"\0" * 40,
        b"[" * 100_000,
        b"7",
        b'{"step": 1, "kind": "train", "loss": 2.5}',  # without its checksum
        *(
            encode(row)[:-1]
            for row in (
                {"step": 1},
                {"step": True, "kind": "train"},
                {"step": -1, "kind": "train"},
                {"step": 1, "kind": 2},
                {"step": 1, "kind": "train", "loss": "2"},
                {"step": 1, "kind": "train", "loss": [2]},
            )
        ),
        b'{"step": 1, "kind": "train", "loss": 1' + b"0" * 5000 + b"}",
        b" " * MAX_LINE_BYTES + b'{"step": 1, "kind": "train", "loss": 2}',
    ],
)
def test_corrupt_lines_are_moved_with_one_warning(tmp_path, caplog, line):
    path = tmp_path / "metrics.jsonl"
    good = encode({"step": 1, "kind": "train", "loss": 2.5})
    path.write_bytes(b"\n".join([good[:-1], line, b"", line, good]))
    write(tmp_path, 5, 6)
    assert steps_in(tmp_path) == [1, 1, 6]
    (warning,) = caplog.messages
    assert warning == f"{path}: 2 corrupted lines moved to {path}.damaged"


@pytest.mark.parametrize(
    "make", [*ODD_FILES.values(), lambda path: os.symlink(f"{path}.nowhere", path)]
)
def test_anything_but_a_file_is_one_warning(tmp_path, caplog, make):
    path = tmp_path / "metrics.jsonl"
    make(path)
    assert read_metrics(str(tmp_path)) == []
    caplog.clear()
    write(tmp_path, 5, 6)
    (warning,) = caplog.messages
    assert warning.endswith("; the rows of this run are not written")
    assert read_metrics(str(tmp_path)) == []
    (tmp_path / "other").mkdir()
    make(tmp_path / "other" / "metrics.jsonl.damaged")
    (tmp_path / "other" / "metrics.jsonl").write_bytes(b"damage\n")
    write(tmp_path / "other", 5, 6)
    assert steps_in(tmp_path / "other") == [6]


def refuse(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_loses_rows_and_stops_nothing(tmp_path, caplog, monkeypatch):
    writer = MetricsWriter(str(tmp_path), 0)
    write_bytes = os.write

    def write_a_part(descriptor, data):
        if len(data) < 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(descriptor, data[: len(data) // 2])

    writer.write(1, "train", loss=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(metrics_module.os, "write", write_a_part)
        writer.write(2, "train", loss=2.0)
        writer.write(3, "train", loss=2.0)
    writer.write(4, "train", loss=3.0)
    writer.close()
    assert [message.count("No space left") for message in caplog.messages] == [1]
    assert steps_in(tmp_path) == [1, 4]


def test_rows_that_cannot_be_copied_are_kept_and_no_more_are_written(tmp_path, caplog, monkeypatch):
    write(tmp_path, 0, 5)
    monkeypatch.setattr(metrics_module, "replaced_file", refuse)
    write(tmp_path, 5, 6)
    assert steps_in(tmp_path) == [5]
    (warning,) = caplog.messages
    assert warning.endswith("No space left on device; the rows of this run are not written")


def test_tensorboard_that_fails_is_one_warning(tmp_path, caplog, monkeypatch):
    (tmp_path / "tensorboard").write_bytes(b"")  # where its folder should be
    write(tmp_path, 0, 5, 6)
    assert [f"{tmp_path}/tensorboard: " in message for message in caplog.messages] == [True]
    (tmp_path / "tensorboard").unlink()
    caplog.clear()

    writer = MetricsWriter(str(tmp_path), 6)
    monkeypatch.setattr(RecordWriter, "flush", refuse)
    for step in range(7, 30):  # more than the queue of tensorboardX holds
        writer.write(step, "train", loss=1.0)
    monkeypatch.undo()
    writer.close()
    assert [f"{tmp_path}/tensorboard: No space" in message for message in caplog.messages] == [True]
    assert steps_in(tmp_path) == [5, 6, *range(7, 30)]


def test_a_corrupt_pytorch_does_not_matter(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libtorch.so: cannot open')")
    code = (
        "import sys; from simplernn_jax.training.metrics import MetricsWriter; "
        "writer = MetricsWriter('.', 0); writer.write(1, 'train', loss=1.0); writer.close(); "
        "assert 'torch' not in sys.modules"
    )
    result = run_python("-c", code, cwd=tmp_path, PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert (result.code, result.errors) == (0, "")
    (path,) = tmp_path.rglob("events.out.tfevents.*")
    assert b"train/loss" in path.read_bytes()
