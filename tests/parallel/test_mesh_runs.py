"""A whole run on a mesh: it evaluates, samples, resumes bit-exactly, and is used on one device."""

import shutil

import numpy as np
import pytest
from small_runs import HYBRID, newest_checkpoint, small_config, write_corpus

from simplernn_jax import load_model
from simplernn_jax.errors import UserError
from simplernn_jax.inference import generate_text
from simplernn_jax.training.loop import train
from simplernn_jax.training.metrics import read_metrics

STEPS, HALF = 6, 3
FIELDS = HYBRID | {
    "mixer_options": {"context": 10},  # into another sequence shard of 6, and another batch
    "vocab_size": 260,
    "num_heads": 2,
    "mlp_dim": 12,
    "validation_fraction": 0.3,
    "mode": "stream",
    "batch_size": 4,
    "sequence_length": 12,
    "steps": STEPS,
    "log_every": 1,
}
EACH_AXIS = {"fsdp": 2, "tensor": 2, "sequence": 2}
HALFWAY = {"eval_every": HALF, "sample_every": HALF, "save_every": HALF}


def test_a_run_on_a_mesh(tmp_path):
    fields = FIELDS | EACH_AXIS | {"source": write_corpus(tmp_path / "text", documents=9)}
    whole = train(small_config(**fields, **HALFWAY), str(tmp_path / "whole"))
    assert (whole.step, whole.interrupted_by) == (STEPS, None)
    assert np.isfinite(whole.evaluation.nats_per_token)
    rows = read_metrics(str(tmp_path / "whole"))
    kinds = [(row["step"], row["kind"]) for row in rows]
    assert kinds[HALF : HALF + 2] == [(HALF, "validation"), (HALF, "sample")]
    assert {row["recompilations"] for row in rows if row["kind"] == "train"} == {0}

    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / str(STEPS))
    assert train(small_config(**fields), str(tmp_path / "half")).step == STEPS
    found, expected = newest_checkpoint(tmp_path / "half"), newest_checkpoint(tmp_path / "whole")
    for saved in (found, expected):
        del saved["position in the data"]["evaluations"]  # one evaluates at its end only
    assert found == expected

    model, tokenizer, config = load_model(str(tmp_path / "whole"))
    assert config.mesh.tensor == 2
    (text,) = generate_text(model, tokenizer, "ab", max_new_tokens=3)
    assert isinstance(text, str)


def test_a_run_that_does_not_fit_its_mesh_is_rejected_before_it_trains(tmp_path):
    config = small_config(**FIELDS, source=write_corpus(tmp_path / "text"), data=8)
    with pytest.raises(UserError, match=r"batch_size=4 is not divisible by data 8 \* fsdp 1"):
        train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()
