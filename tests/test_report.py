"""The picture and the summary at the end of a run."""

from matplotlib.image import imread

from simplernn_jax.training.metrics import MetricsWriter
from simplernn_jax.training.report import plot_loss, summary


def picture(workdir, **rows):
    workdir.mkdir(exist_ok=True)
    writer = MetricsWriter(str(workdir), 0)
    for kind, losses in rows.items():
        for step, loss in enumerate(losses):
            writer.write(step, kind, **({} if loss is None else {"loss": loss}))
    writer.close()
    path = plot_loss(str(workdir))
    assert path == str(workdir / "loss_curve.png")
    return imread(path)


def test_both_curves_are_drawn(tmp_path):
    both = picture(tmp_path, train=[5.0, 3.0, 2.0, float("nan"), 1.0], validation=[4.0, 2.5])
    train = picture(tmp_path / "train", train=[5.0, 3.0, 2.0, float("nan"), 1.0])
    assert both.shape == train.shape == (540, 960, 4)
    assert (both != train).any()


def test_a_run_without_numbers_leaves_an_empty_grid(tmp_path):
    empty = picture(tmp_path)
    curve = picture(tmp_path / "train", train=[5.0, 3.0])
    assert empty.std() > 0
    assert (empty != curve).any()


def test_summary_is_aligned():
    assert summary({"steps": "40", "loss curve": "a.png"}) == (
        "  steps       40\n  loss curve  a.png"
    )
