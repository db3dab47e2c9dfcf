"""The loss curve at the end of a run."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from simplernn_jax.training.metrics import MetricsWriter, plot_loss


def picture(workdir, model="a model", **rows):
    workdir.mkdir(exist_ok=True)
    writer = MetricsWriter(str(workdir), 0)
    for kind, losses in rows.items():
        for step, loss in enumerate(losses):
            writer.write(step, kind, **({} if loss is None else {"loss": loss}))
    writer.close()
    path = plot_loss(str(workdir), model)
    assert path == str(workdir / "loss_curve.png")
    return imread(path)


def test_both_curves_are_drawn_and_a_run_may_have_none(tmp_path):
    train = [5.0, 3.0, 2.0, math.nan, 1.0]
    pictures = [
        picture(tmp_path / "both", train=train, validation=[4.0, 2.5]),
        picture(tmp_path / "one", train=train),
        picture(tmp_path / "none"),
    ]
    assert {image.shape for image in pictures} == {(540, 960, 4)}
    assert len({image.tobytes() for image in pictures}) == 3


@pytest.fixture
def figures(monkeypatch):
    """All figures that are drawn."""
    drawn = []
    savefig = Figure.savefig

    def save(figure, *args, **options):
        drawn.append(figure)
        return savefig(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", save)
    return drawn


def test_the_picture_names_the_run_and_its_best_step(tmp_path, figures):
    validation = [4.0, 2.5, 2.125, math.nan, 2.25]
    picture(tmp_path / "my_$run$", "plain model, 17 parameters", validation=validation)
    (axes,) = figures[0].axes
    assert axes.get_title() == "my_$run$: plain model, 17 parameters"
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [
        "validation",
        "best 2.125 at step 2",
    ]
    _, ring = axes.lines
    assert (*ring.get_xdata(), *ring.get_ydata()) == (2, 2.125)
    picture(tmp_path / "b", "x" * 1000, validation=[math.nan])
    assert len(figures[1].axes[0].get_title()) <= 80
    assert len(figures[1].axes[0].lines) == 1


def test_high_losses_of_the_beginning_leave_room_for_the_rest(tmp_path, figures):
    falling = [100.0, 30.0, *np.linspace(3.0, 2.0, 40)]
    picture(tmp_path / "a", train=falling, validation=[math.nan] * 30 + [2.5])
    assert 3.0 < figures[0].axes[0].get_ylim()[1] < 3.5


def test_one_validation_curve_of_the_same_tokens_ends_at_the_last_step(tmp_path, figures):
    writer = MetricsWriter(str(tmp_path), 0)
    for step, loss, predictions in [(1, 1.5, 640), (2, 2.5, 64), (3, 2.75, 64), (4, 2.5, 64)]:
        writer.write(step, "validation", loss=loss, predictions=predictions)
    writer.write(4, "held_out", loss=1.25, predictions=6400)
    writer.close()
    plot_loss(str(tmp_path), "a model")
    validation, ring = figures[0].axes[0].lines
    assert list(validation.get_xdata()) == [2, 3, 4]
    assert (*ring.get_xdata(), *ring.get_ydata()) == (4, 2.5)  # of equal losses the newest
