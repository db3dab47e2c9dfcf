"""Runs of a given time: their schedule, their resumption and their size."""

import json
import re

import jax
import numpy as np
import pytest
from small_runs import newest_checkpoint, small_config, stop_after, write_corpus

from simplernn_jax.config import Config, from_json
from simplernn_jax.errors import UserError
from simplernn_jax.training import loop, minutes
from simplernn_jax.training.evaluate import Evaluator
from simplernn_jax.training.loop import train
from simplernn_jax.training.minutes import MIN_STEPS, SIZES, Costs, auto_size, choose, measure, plan
from simplernn_jax.training.run import Run
from simplernn_jax.training.train_step import make_train_step

COSTS = Costs(step=0.05, scored=0.01)
HELD_OUT = 3_000_000


def planned(limit, seconds, costs=COSTS, **fields):
    """The configuration of a run of `limit` minutes, of which `seconds` are left."""
    fields = {"eval_every": 1, "save_every": 1, "sample_every": 1, "warmup_steps": 100} | fields
    config = small_config(minutes=limit, **fields)
    plan(config, costs, seconds, HELD_OUT)
    return config


@pytest.mark.parametrize(("limit", "evaluations"), [(1.0, 4), (5.0, 5), (30.0, 20)])
def test_the_schedule_fills_the_seconds_that_are_left(limit, evaluations):
    seconds = 60 * limit - 20
    config = planned(limit, seconds)
    train, steps = config.train, config.train.steps
    scored = (train.held_out_tokens or HELD_OUT) + evaluations * train.eval_tokens
    used = steps * COSTS.step + scored * COSTS.scored / 1000
    assert used + minutes.END_SECONDS == pytest.approx(seconds, abs=2 * COSTS.step)
    assert config.optimizer.warmup_steps == min(100, steps // 10)
    assert train.eval_every == train.save_every == -(-steps // evaluations)
    assert (train.sample_every, train.minutes) == (-(-steps // 2), 0)
    assert planned(limit, seconds, COSTS._replace(step=0.025)).train.steps > 1.5 * steps


def test_slow_evaluations_are_fewer_and_intervals_of_0_stay_0():
    train = planned(5.0, 280, COSTS._replace(scored=0.2), sample_every=0, save_every=0).train
    assert train.eval_every == train.steps
    assert train.sample_every == train.save_every == 0


def test_too_few_minutes_are_rejected_with_the_least_that_suffice():
    with pytest.raises(UserError, match=r"^--minutes=0\.5: too short: .* use at least") as caught:
        planned(0.5, 30 - 29)
    least = float(re.search(r"--minutes=([\d.]+)$", str(caught.value))[1])
    assert 0.5 < least < 0.7
    assert planned(least, 60 * least - 29).train.steps >= MIN_STEPS


@pytest.mark.parametrize("mesh", [{}, {"data": 1, "fsdp": 2}])
def test_measuring_leaves_the_run_as_it_was_and_compiles_the_step_once(tmp_path, mesh):
    source = write_corpus(tmp_path / "text")
    fields = {"source": source, "minutes": 0.01, "validation_fraction": 0.3, "sample_tokens": 2}
    config = small_config(**fields, **mesh)
    with Run(config, str(tmp_path / "run")) as run:
        before, position = jax.device_get(run.state), run.position
        step = make_train_step(run.config, run.optimizer, run.mesh, with_steps=True)
        assert min(measure(run, step, Evaluator(run.config, run.corpus.tokenizer.pad_id))) > 0
        assert (run.position, run.step) == (position, 0)
        jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(run.state))
        run.total_steps = 9
        step(run.state, run.next_batch(), run.schedule)
        assert step._cache_size() == 1


def test_a_run_of_a_minute_resumes_with_its_schedule(tmp_path, monkeypatch):
    fields = {"source": write_corpus(tmp_path / "text"), "save_every": 1, "warmup_steps": 6}
    config, whole, parts = small_config(minutes=1.0, **fields), tmp_path / "one", tmp_path / "two"
    monkeypatch.setattr(minutes, "measure", lambda *_: Costs(1.0, 0.0))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert train(config, parts).step == 3
    saved = json.loads((parts / "config.json").read_text())
    steps = saved["train"]["steps"]
    assert 20 <= steps <= 58
    assert saved["optimizer"]["warmup_steps"] == min(6, steps // 10)
    monkeypatch.setattr(loop, "set_schedule", None)  # steps are known: nothing is measured
    train(from_json(json.dumps(saved)), whole)
    assert train(config, parts).step == steps
    assert newest_checkpoint(parts) == newest_checkpoint(whole)
    assert "No text was held out" in (whole / "report.html").read_text("utf-8")


def test_more_time_text_or_speed_never_choose_a_smaller_model():
    seconds, sizes, speeds = (15, 60, 300, 1800), [10**n for n in range(3, 10)], (1e10, 1e11, 1e14)
    chosen = [[[choose(a, b, c).width for c in speeds] for b in sizes] for a in seconds]
    assert all(np.all(np.diff(chosen, axis=axis) >= 0) for axis in range(3))
    assert {np.min(chosen), np.max(chosen)} == {SIZES[0].width, SIZES[-1].width}


def test_an_automatic_size_keeps_what_is_given(tmp_path, monkeypatch):
    config = Config()
    with pytest.raises(UserError, match="--size=auto: needs --minutes"):
        auto_size(config, "")
    monkeypatch.setattr(minutes, "measure_flops", lambda: 1e11)
    config.data.source, config.data.batch_size = write_corpus(tmp_path / "text"), 2
    config.train.minutes, config.model.hidden_dim = 1.0, 24
    auto_size(config, "")
    assert (config.model.hidden_dim, config.data.batch_size) == (24, 2)
    assert (config.model.num_layers, config.model.key_dim) == SIZES[0][:2]  # little text
    assert (config.optimizer.name, config.data.tokenizer) == ("muon", "byte")
    assert (config.model.dropout, config.optimizer.weight_decay) == (0.2, 0.3)  # many passes
