"""Checkpoints of runs with stages: single layers on disk, whatever the number of stages."""

import shutil

import numpy as np
import pytest
from small_runs import newest_checkpoint, small_config, stop_after, write_corpus

from simplernn_jax.config import MeshConfig
from simplernn_jax.training.loop import train
from simplernn_jax.training.metrics import read_metrics


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return small_config(
        source=write_corpus(tmp_path_factory.mktemp("corpus") / "text"),
        **{"num_layers": 2, "sequence_length": 8, "batch_size": 4, "mode": "stream"},
        **{"name": "muon", "steps": 7, "log_every": 1, "validation_fraction": 0.2},
    )


def run(config, workdir, monkeypatch, last_step, **sizes):
    """Train on a mesh; return the result and the printed text."""
    config.mesh = MeshConfig(**({"data": 1} | sizes))
    with monkeypatch.context() as patch:
        display = stop_after(patch, last_step)
        return train(config, str(workdir)), " ".join(display.lines)


@pytest.mark.oldest_python
def test_a_run_resumes_with_another_number_of_stages(config, tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    run(config, one, monkeypatch, 3)
    shutil.copytree(one, two)
    on_one, _ = run(config, one, monkeypatch, 9)
    on_two, printed = run(config, two, monkeypatch, 9, pipeline=2, data=2)
    assert "2 stages, 8 chunks of 1 tokens: a stage is idle 11.1% of the time" in printed
    assert "at step 3 of 7" in printed
    assert on_two.step == on_one.step == 7
    back, _ = run(config, two, monkeypatch, 9)  # all steps are done: it only evaluates
    predictions = {result.evaluation.predictions for result in (on_one, on_two, back)}
    assert len(predictions) == 1
    assert back.evaluation.nats_per_token == pytest.approx(on_two.evaluation.nats_per_token)
    losses = [
        [row["loss"] for row in read_metrics(str(workdir))] + [result.evaluation.nats_per_token]
        for workdir, result in ((one, on_one), (two, on_two))
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    found, expected = newest_checkpoint(two), newest_checkpoint(one)
    assert list(found) == list(expected)
    names = [name for name in expected if name.startswith(("params", "opt_state", "carried"))]
    assert any("layers/1/" in name for name in names)
    values = [
        np.concatenate([np.frombuffer(saved[name][2], saved[name][0]) for name in names])
        for saved in (found, expected)
    ]
    assert np.linalg.norm(values[0] - values[1]) < 1e-5 * np.linalg.norm(values[1])
