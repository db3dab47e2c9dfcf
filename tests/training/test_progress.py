"""Progress of a run: summed losses, and validation losses that end it early."""

import dataclasses
import json
import math

import pytest
from small_runs import newest_checkpoint, small_config, stop_after, write_corpus

from simplernn_jax.training.evaluate import Evaluation
from simplernn_jax.training.loop import train
from simplernn_jax.training.metrics import read_metrics
from simplernn_jax.training.run import LossTotals, ValidationHistory


def test_the_mean_loss_is_weighted_by_tokens_and_starts_anew():
    totals = LossTotals()
    totals.add(2.0, 30, skipped=False)
    totals.add(5.0, 10, skipped=False)
    totals.add(math.inf, 3, skipped=True)
    resumed = LossTotals(**dataclasses.asdict(totals))
    assert resumed.pop_mean_loss() == totals.pop_mean_loss() == (2.0 * 30 + 5.0 * 10) / 40
    totals.add(math.nan, 7, skipped=True)
    assert math.isnan(totals.pop_mean_loss())
    assert totals.tokens == 50


def evaluated(*losses, predictions=99):
    """History after evaluations at steps 10, 20, ..."""
    history = ValidationHistory()
    for number, loss in enumerate(losses, 1):
        history.add(10 * number, Evaluation(loss, 1.0, predictions), is_scheduled=True)
    return history


@pytest.mark.parametrize(
    ("losses", "limit", "ended"),
    [
        ((), 1, False),
        ((3.0, 2.0), 1, False),
        ((3.0, 3.0), 1, True),
        ((3.0, 4.0), 0, False),
        ((3.0, 4.0, 2.9, 3.0), 2, False),
        ((3.0, math.nan, math.inf), 2, True),
        ((math.nan,), 1, True),
    ],
)
def test_evaluations_without_a_better_one_end_a_run(losses, limit, ended):
    history = evaluated(*losses)
    assert history.should_stop(limit) is ended
    again = ValidationHistory(**json.loads(json.dumps(vars(history), allow_nan=False)))
    assert again == history


def test_the_end_of_a_run_is_no_evaluation_without_a_better_one():
    history = evaluated(3.0, 4.0)
    history.add(25, Evaluation(3.5, 1.0, 99), is_scheduled=False)
    assert not history.should_stop(2)
    history.add(27, Evaluation(2.5, 1.0, 99), is_scheduled=False)
    assert (history.best_step, history.since_best) == (27, 0)


@pytest.mark.parametrize(
    ("losses", "best", "overfits"),
    [
        ((2.5, 2.0001, 2.0), None, False),
        ((2.5, 2.01, 2.02), "2.0100 nats/token at step 20, 0.0100 lower than at step 30", False),
        ((2.5, 2.02, 3.0, 3.71), "2.0200 nats/token at step 20, 1.6900 lower than at", True),
    ],
)
def test_the_end_is_compared_with_the_best(losses, best, overfits):
    summary = evaluated(*losses).summary(stopped_early=False)
    assert summary.get("best validation", "").startswith(best or "")
    assert ("best validation" in summary, "overfitting" in summary) == (best is not None, overfits)


def test_another_number_of_tokens_starts_a_new_history():
    history = evaluated(3.0, 2.0, 2.5)
    history.add(40, Evaluation(2.2, 1.0, predictions=500), is_scheduled=True)
    assert (history.best_step, history.since_best) == (40, 0)
    assert history.summary(stopped_early=False) == {}


@pytest.mark.oldest_python
def test_a_run_that_stops_early_does_so_at_the_same_step_when_interrupted(
    tmp_path, monkeypatch, capsys
):
    config = small_config(
        source=write_corpus(tmp_path / "text"),
        validation_fraction=0.3,
        learning_rate=0.3,
        steps=300,
        eval_every=4,
        save_every=4,
        early_stopping_patience=2,
    )
    whole = train(config, str(tmp_path / "whole"))
    said = capsys.readouterr().out
    rows = [row for row in read_metrics(str(tmp_path / "whole")) if row["kind"] == "validation"]
    losses = [row["loss"] for row in rows]
    assert whole.step == rows[-1]["step"] < 300
    assert losses.index(min(losses)) == len(losses) - 3
    best = rows[-3]["step"]
    assert said.count(f"stopped early at step {whole.step}: no better validation loss in 2") == 1
    assert f"{min(losses):.4f} nats/token at step {best}, " in said

    with monkeypatch.context() as patch:
        stop_after(patch, whole.step - 2)
        assert train(config, str(tmp_path / "parts")).interrupted_by == "SIGTERM"
    assert train(config, str(tmp_path / "parts")) == whole
    assert newest_checkpoint(tmp_path / "parts") == newest_checkpoint(tmp_path / "whole")
