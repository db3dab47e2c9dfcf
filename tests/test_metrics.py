"""The metrics of a run on disk, over interruptions."""

import json

from simplernn_jax.training.metrics import MetricsWriter, read_metrics


def write(workdir, first_step, *steps, loss=1.5):
    writer = MetricsWriter(str(workdir), first_step)
    for step in steps:
        writer.write(step, "train", loss=loss, skipped_updates=0)
    writer.close()


def steps_in(workdir):
    return [row["step"] for row in read_metrics(str(workdir))]


def test_rows_are_json_objects_with_step_and_kind(tmp_path):
    writer = MetricsWriter(str(tmp_path), 0)
    writer.write(3, "train", loss=1.5)
    writer.write(3, "sample", text="zwölf\u2028\n")
    # Readable while the run goes on.
    rows = read_metrics(str(tmp_path))
    writer.close()
    assert rows == [
        {"step": 3, "kind": "train", "loss": 1.5},
        {"step": 3, "kind": "sample", "text": "zwölf\u2028\n"},
    ]
    assert read_metrics(str(tmp_path)) == rows


def test_a_workdir_without_metrics_has_no_rows(tmp_path):
    assert read_metrics(str(tmp_path)) == []


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    write(tmp_path, 0, 5, 10, 15)
    write(tmp_path, 10, 12, loss=2.5)
    assert steps_in(tmp_path) == [5, 10, 12]
    write(tmp_path, 0)
    assert steps_in(tmp_path) == []


def test_a_row_that_an_earlier_run_wrote_is_not_written_again(tmp_path):
    write(tmp_path, 0, 5, 10)
    write(tmp_path, 10, 10, 15, loss=2.5)
    assert steps_in(tmp_path) == [5, 10, 15]
    assert read_metrics(str(tmp_path))[1]["loss"] == 1.5


def test_a_line_cut_off_by_a_crash_is_left_out_and_later_ones_are_whole(tmp_path):
    write(tmp_path, 0, 5, 10)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    assert steps_in(tmp_path) == [5]
    write(tmp_path, 10, 15)
    assert steps_in(tmp_path) == [5, 15]
    for line in path.read_text(encoding="utf-8").splitlines():
        json.loads(line)


def test_what_is_not_finite_is_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kind": "train", "loss": NaN}\n')  # as earlier versions wrote it
    writer = MetricsWriter(str(tmp_path), 1)
    writer.write(2, "train", loss=float("inf"), gradient_norm=0.5)
    writer.close()
    assert path.read_text() == (
        '{"step": 1, "kind": "train", "loss": null}\n'
        '{"step": 2, "kind": "train", "loss": null, "gradient_norm": 0.5}\n'
    )


def test_tensorboard_gets_the_same_numbers(tmp_path):
    writer = MetricsWriter(str(tmp_path), 0)
    writer.write(3, "train", loss=1.5)
    writer.write(3, "sample", text="abc")
    writer.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in path.read_bytes()
    assert b"sample/text" in path.read_bytes()
