"""The metrics of a run on disk, over interruptions, and its loss curve."""

import json
import math
import time
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from simplernn_jax.training.metrics import MetricsWriter, plot_loss, read_metrics


def write(workdir, first_step, *steps, loss=1.5):
    writer = MetricsWriter(str(workdir), first_step)
    for step in steps:
        writer.write(step, "train", loss=loss, seconds=step / 2)
    writer.close()
    return writer


def steps_in(workdir):
    return [row["step"] for row in read_metrics(str(workdir))]


def test_rows_are_json_objects_with_step_kind_and_time_and_tensorboard_events(tmp_path):
    before, workdir = time.time(), tmp_path / "base"
    workdir.mkdir()
    assert read_metrics(str(workdir)) == []
    writer = MetricsWriter(str(workdir), 0)
    writer.write(3, "train", loss=1.5, gradient_norm=math.inf)
    writer.write(3, "sample", text="zwölf\u2028\n")
    rows = read_metrics(str(workdir))  # readable while the run writes
    writer.close()
    assert read_metrics(str(workdir)) == rows
    # TensorBoard names a run by the path of this file's folder below --logdir.
    (path,) = tmp_path.rglob("events.out.tfevents.*")
    assert path.parent.relative_to(tmp_path) == Path("base", "tensorboard")
    assert b"train/loss" in path.read_bytes()
    assert b"sample/text" in path.read_bytes()
    assert all(abs(row.pop("wall_time") - before) < 3600 for row in rows)
    assert rows == [
        {"step": 3, "kind": "train", "loss": 1.5, "gradient_norm": None},
        {"step": 3, "kind": "sample", "text": "zwölf\u2028\n"},
    ]


def test_a_resume_drops_rows_after_the_checkpoint_and_repeats_none(tmp_path):
    write(tmp_path, 0, 5, 10, 15)
    assert write(tmp_path, 10, 10, 12, loss=2.5).seconds == 5
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


@pytest.mark.parametrize(
    "line",
    [b'{"step": 10, "kind": "tra', b"\xff\xfe", b'{"step": 1}'],  # the first of a killed run
)
def test_a_line_that_is_no_row_is_left_out_and_later_ones_are_intact(tmp_path, line):
    write(tmp_path, 0, 5)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + line)
    assert steps_in(tmp_path) == [5]
    write(tmp_path, 10, 15)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [5, 15]


def test_the_picture_names_the_run_and_its_best_step_among_those_of_the_same_tokens(
    tmp_path, monkeypatch
):
    figures, savefig = [], Figure.savefig

    def save(figure, *args, **options):
        figures.append(figure)
        return savefig(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", save)
    workdir = tmp_path / "my_$run$"
    workdir.mkdir()
    writer = MetricsWriter(str(workdir), 0)
    writer.write(1, "train", loss=5.0)
    writer.write(1, "validation", loss=1.5, predictions=640)
    for step, loss in enumerate([2.5, 2.125, math.nan, 2.125], 2):
        writer.write(step, "validation", loss=loss, predictions=64)
    writer.write(5, "held_out", loss=1.25, predictions=6400)
    writer.close()
    path = plot_loss(str(workdir), "plain model, 17 parameters")
    assert imread(path).shape == (540, 960, 4)
    (axes,) = figures[0].axes
    assert axes.get_title() == "my_$run$: plain model, 17 parameters"
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert legend == ["training", "validation", "best 2.125 at step 5"]  # of equal ones the newest
    train, validation, ring = axes.lines
    assert list(train.get_xdata()) == [1]
    assert list(validation.get_xdata()) == [2, 3, 4, 5]
    assert (*ring.get_xdata(), *ring.get_ydata()) == (5, 2.125)
