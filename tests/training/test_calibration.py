"""Runs of a given time: their schedule, their resumption and their size."""

import json
import re

import jax
import numpy as np
import pytest
from small_runs import newest_checkpoint, save_untrained, small_config, stop_after, write_corpus

from simplernn_jax.config import Config, DataConfig, from_json
from simplernn_jax.errors import UserError
from simplernn_jax.training import calibration, loop, preparation
from simplernn_jax.training.calibration import Costs, held_out_limit, measure, plan
from simplernn_jax.training.evaluate import Evaluator
from simplernn_jax.training.loop import train
from simplernn_jax.training.run import Run
from simplernn_jax.training.sizing import SIZES, auto_size, choose
from simplernn_jax.training.train_step import make_train_step

COSTS = Costs(step=0.05, scored=0.01, sample=0.2)


def planned(minutes, seconds, costs=COSTS, **fields):
    """A run of 8 sequences of 256 tokens, with 600,000 held-out tokens."""
    fields = {"eval_every": 1, "save_every": 1, "sample_every": 1, "warmup_steps": 100} | fields
    config = small_config(minutes=minutes, batch_size=8, sequence_length=256, **fields)
    plan(config, costs, seconds, 600_000)
    return config


@pytest.mark.parametrize(("minutes", "evaluations"), [(1.0, 4), (5.0, 5), (30.0, 20)])
def test_the_schedule_fills_the_seconds_that_are_left(minutes, evaluations):
    seconds = 60 * minutes - 20
    config = planned(minutes, seconds)
    steps = config.train.steps
    scored = min(600_000, held_out_limit(config)) + evaluations * config.train.eval_tokens
    used = steps * COSTS.step + scored * COSTS.scored / 1000 + 4 * COSTS.sample
    assert used + calibration.END_SECONDS == pytest.approx(seconds, abs=2 * COSTS.step)
    assert config.optimizer.warmup_steps == min(100, steps // 10)
    assert config.train.eval_every == config.train.save_every == -(-steps // evaluations)
    assert config.train.sample_every == -(-steps // 2)
    assert planned(minutes, seconds, COSTS._replace(step=0.025)).train.steps > 1.5 * steps


def test_slow_evaluations_are_fewer_and_intervals_of_0_stay_0():
    config = planned(5.0, 280, COSTS._replace(scored=0.2), sample_every=0, save_every=0)
    assert config.train.eval_every == config.train.steps
    assert config.train.sample_every == config.train.save_every == 0
    assert held_out_limit(config) == max(config.train.eval_tokens, config.train.steps * 8 * 64)
    assert held_out_limit(small_config()) == 0


def test_too_few_minutes_are_rejected_with_the_least_that_suffice():
    with pytest.raises(UserError, match=r"^--minutes=0\.5: too short: .* use at least") as caught:
        planned(0.5, 30 - 29)
    least = float(re.search(r"--minutes=([\d.]+)$", str(caught.value))[1])
    assert 0.5 < least < 0.7
    assert planned(least, 60 * least - 29).train.steps >= calibration.MIN_STEPS


def test_measuring_leaves_the_run_as_it_was_and_compiles_the_step_once(tmp_path):
    source = write_corpus(tmp_path / "text")
    config = small_config(source=source, minutes=0.01, validation_fraction=0.3, sample_tokens=2)
    with Run(config, str(tmp_path / "run")) as run:
        before, position = jax.device_get(run.state), run.position
        step = make_train_step(run.config, run.optimizer, run.mesh)
        costs = measure(run, step, Evaluator(run.config, run.corpus.tokenizer.pad_id))
        assert min(costs) > 0
        assert (run.position, run.step) == (position, 0)
        jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(run.state))
        run.total_steps = 9
        step(run.state, run.next_batch(), *run.schedule)
        assert step._cache_size() == 1


@pytest.fixture
def slow_steps(monkeypatch):
    monkeypatch.setattr(loop, "measure", lambda *_: Costs(1.0, 0.0, 0.0))


def test_a_run_of_a_minute_resumes_with_its_schedule(tmp_path, monkeypatch, slow_steps):
    fields = {"source": write_corpus(tmp_path / "text"), "save_every": 1, "warmup_steps": 6}
    config, whole, parts = small_config(minutes=1.0, **fields), tmp_path / "one", tmp_path / "two"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert train(config, parts).step == 3
    saved = json.loads((parts / "config.json").read_text())
    steps = saved["train"]["steps"]
    assert 20 <= steps <= 58
    assert saved["optimizer"]["warmup_steps"] == min(6, steps // 10)
    monkeypatch.setattr(loop, "measure", None)
    train(from_json(json.dumps(saved)), whole)  # its steps are known: nothing is measured
    assert train(config, parts).step == steps
    assert newest_checkpoint(parts) == newest_checkpoint(whole)
    other = tmp_path / "three"
    save_untrained(small_config(**fields), other)
    for minutes, workdir, length in ((2.0, parts, "--minutes=1"), (1.0, other, "40 steps")):
        with pytest.raises(UserError, match=rf"^--minutes={minutes:g}: .* started with {length}"):
            train(small_config(minutes=minutes, **fields), workdir)


def test_more_time_text_or_speed_never_choose_a_smaller_model():
    seconds, sizes, speeds = (15, 60, 300, 1800), [10**n for n in range(3, 10)], (1e10, 1e11, 3e12)
    chosen = [[[choose(a, b, c).width for c in speeds] for b in sizes] for a in seconds]
    assert all(np.all(np.diff(chosen, axis=axis) >= 0) for axis in range(3))
    assert {np.min(chosen), np.max(chosen)} == {SIZES[0].width, SIZES[-1].width}


def test_an_automatic_size_keeps_what_is_given_and_what_it_chose(tmp_path, slow_steps, monkeypatch):
    config, text = Config(), write_corpus(tmp_path / "text")
    config.data = DataConfig(source=text, batch_size=2, sequence_length=7)
    config.train.minutes, config.train.size = 1.0, "auto"
    config.model.hidden_dim, config.mesh.data = 24, 1
    monkeypatch.setattr(preparation, "measure_flops", lambda: 1e11)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        train(config, tmp_path / "run")
    saved = from_json((tmp_path / "run" / "config.json").read_text())
    assert (saved.model.hidden_dim, saved.data.batch_size) == (24, 2)
    assert (saved.model.num_layers, saved.model.key_dim) == SIZES[0][:2]  # little text
    assert (saved.optimizer.name, saved.data.tokenizer) == ("muon", "byte")
    assert (saved.train.size, config.train.size) == ("given", "auto")
    monkeypatch.setattr(preparation, "measure_flops", None)
    assert train(config, tmp_path / "run").step == saved.train.steps
    config.data.source = lambda: ["ab" * 600_000]  # texts from Python are measured too
    assert auto_size(config, str(tmp_path), 1e15).model.num_layers == SIZES[1].num_layers
