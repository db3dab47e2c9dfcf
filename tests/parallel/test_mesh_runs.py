"""Whole runs on meshes: they end like one on one device, and resume on any other mesh."""

import shutil

import numpy as np
import pytest
from small_runs import HYBRID, newest_checkpoint, small_config, write_corpus

from simplernn_jax import load_model
from simplernn_jax.errors import UserError
from simplernn_jax.inference import generate_text
from simplernn_jax.training.loop import train
from simplernn_jax.training.metrics import read_metrics

EACH_AXIS = {"fsdp": 2, "tensor": 2, "sequence": 2}
STEPS, HALF = 6, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh_runs")
    write_corpus(folder / "text", documents=9)
    return folder


def run(folder, name, steps=STEPS, **fields):
    """Train in ``folder/name``; the learning rate schedule is the same for any number of steps.

    Attention looks back 10 tokens: into another sequence shard of 6, and another batch.
    """
    config = small_config(
        **{
            **HYBRID,
            "mixer_options": {"context": 10},
            "vocab_size": 260,
            "num_heads": 2,
            "mlp_dim": 12,
            "source": str(folder / "text"),
            "validation_fraction": 0.3,
            "mode": "stream",
            "batch_size": 4,
            "sequence_length": 12,
            "final_learning_rate": 1.0,
            "steps": steps,
            "log_every": 1,
            **fields,
        }
    )
    return train(config, str(folder / name))


@pytest.fixture(scope="module")
def whole(folder):
    """The result of an uninterrupted run on a mesh with every axis but stages."""
    return run(folder, "whole", eval_every=HALF, sample_every=HALF, save_every=HALF, **EACH_AXIS)


@pytest.fixture(scope="module")
def half(folder, whole):
    """Workdir of the same run without what follows its first checkpoint."""
    shutil.copytree(folder / "whole", folder / "half")
    shutil.rmtree(folder / "half" / "checkpoints" / str(STEPS))
    return folder / "half"


def losses(workdir):
    return [row["loss"] for row in read_metrics(str(workdir)) if row["kind"] == "train"]


def arrays(workdir):
    """Arrays of the newest checkpoint by name."""
    saved = newest_checkpoint(workdir)
    return {name: np.frombuffer(value[2], value[0]) for name, value in saved.items() if "/" in name}


def test_a_run_on_a_mesh_evaluates_and_samples(folder, whole):
    assert (whole.step, whole.interrupted_by) == (STEPS, None)
    assert np.isfinite(whole.evaluation.nats_per_token)
    kinds = [(row["step"], row["kind"]) for row in read_metrics(str(folder / "whole"))]
    assert kinds[HALF : HALF + 2] == [(HALF, "validation"), (HALF, "sample")]
    rows = read_metrics(str(folder / "whole"))
    assert {row["recompilations"] for row in rows if row["kind"] == "train"} == {0}


def test_resume_on_the_same_mesh_is_bit_exact(folder, whole, half):
    shutil.copytree(half, folder / "same")
    assert run(folder, "same", **EACH_AXIS).step == STEPS
    found, expected = newest_checkpoint(folder / "same"), newest_checkpoint(folder / "whole")
    for saved in (found, expected):
        del saved["position in the data"]["evaluations"]  # one evaluates at its end only
    assert found == expected


def test_resume_on_one_device_agrees(folder, whole, half):
    shutil.copytree(half, folder / "alone")
    assert run(folder, "alone").step == STEPS
    np.testing.assert_allclose(losses(folder / "alone"), losses(folder / "whole"), rtol=1e-5)
    expected, ours = arrays(folder / "whole"), arrays(folder / "alone")
    assert ours.keys() == expected.keys()
    for array in expected:
        if array.startswith(("params", "carried")):
            np.testing.assert_allclose(ours[array], expected[array], atol=1e-4, err_msg=array)


def test_a_model_trained_on_a_mesh_generates_on_one_device(folder, whole):
    model, tokenizer, config = load_model(str(folder / "whole"))
    assert config.mesh.tensor == 2
    (text,) = generate_text(model, tokenizer, "ab", max_new_tokens=3)
    assert isinstance(text, str)


def test_a_run_that_does_not_fit_its_mesh_is_refused_before_it_trains(folder):
    with pytest.raises(UserError, match=r"batch_size=4 is not divisible by data 8 \* fsdp 1"):
        run(folder, "refused", data=8)
    assert not (folder / "refused" / "checkpoints").exists()
