"""Choice of the checkpoints to use and to keep."""

import contextlib

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_runs import small_config

from simplernn_jax import load_model
from simplernn_jax.checkpoint.checkpointer import Checkpointer, read_config
from simplernn_jax.checkpoint.contents import Quality
from simplernn_jax.checkpoint.folder import choose_checkpoint, steps_to_keep
from simplernn_jax.data.tokenizer import ByteTokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.models import LanguageModel


def save(workdir, **evaluations):
    """A checkpoint for each step ``sN``: its loss and number of predictions, or None."""
    checkpointer = Checkpointer(
        str(workdir), small_config(), ByteTokenizer().to_json(), keep_last=9, keep_best=1
    )
    with contextlib.closing(checkpointer):
        for name, evaluation in evaluations.items():
            step, quality = int(name[1:]), Quality(*evaluation) if evaluation else None
            checkpointer.save(step, {"values": jnp.full(3, step)}, {}, quality)


def damage(workdir, step, item="data"):
    (workdir / "checkpoints" / str(step) / item / "metadata").write_bytes(b"[]")


@pytest.mark.parametrize(
    ("evaluations", "step", "reason"),
    [
        ({"s2": (2.5, 7)}, 2, None),
        ({"s2": None}, 2, None),
        (
            {"s2": (2.5, 7), "s3": (2.0218, 7), "s5": (3.71023, 7)},
            3,
            "step 3, the best by validation loss (2.0218 on 7 predictions)",
        ),
        ({"s2": (2.5, 7), "s3": (2.5, 7), "s5": None}, 3, "step 3, the best by validation loss "),
        ({"s2": (2.5, 7), "s3": (2.6, 11)}, 3, "step 3, the newest (validation losses are missing"),
        ({"s2": None, "s3": None}, 3, "step 3, the newest (validation losses are missing"),
        ({"s2": (float("nan"), 7), "s3": (2.6, 7), "s5": (float("inf"), 7)}, 3, "step 3, the best"),
    ],
)
def test_the_best_is_used_where_all_were_evaluated_on_the_same_tokens(
    tmp_path, evaluations, step, reason
):
    save(tmp_path, **evaluations)
    chosen, why = choose_checkpoint(str(tmp_path))
    assert chosen == step
    assert why.startswith(f"checkpoint: {reason}") if reason else not why


def test_the_newest_or_any_step_is_used_where_that_is_asked_for(tmp_path):
    save(tmp_path, s2=(2.0, 7), s3=(3.0, 7), s11=(2.5, 7))
    assert choose_checkpoint(str(tmp_path), "newest") == (11, "")
    for step in (3, "3"):
        assert choose_checkpoint(str(tmp_path), step) == (3, "")
    assert read_config(str(tmp_path))[2] == 11
    assert read_config(str(tmp_path), "best")[2] == 2
    with pytest.raises(UserError, match=r"--checkpoint=4: .*has only these steps: 2, 3, 11"):
        choose_checkpoint(str(tmp_path), 4)
    for word in ("oldest", "-3", "", "٣"):
        with pytest.raises(UserError, match="specify best, newest or a step"):
            choose_checkpoint(str(tmp_path), word)


def test_a_corrupt_best_is_moved_aside_and_the_next_best_used(tmp_path):
    save(tmp_path, s2=(2.0, 7), s3=(3.0, 7), s5=(2.5, 7))
    damage(tmp_path, 2)
    with pytest.raises(UserError, match=r"--checkpoint=2: .*2 is corrupted: data/metadata was"):
        choose_checkpoint(str(tmp_path), 2)
    assert choose_checkpoint(str(tmp_path))[0] == 5
    assert (tmp_path / "checkpoints_damaged" / "2").is_dir()
    damage(tmp_path, 5, "quality")
    assert choose_checkpoint(str(tmp_path))[0] == 3


def test_no_checkpoint_is_said_whichever_is_asked_for(tmp_path):
    for checkpoint in ("best", "newest"):
        with pytest.raises(UserError, match=rf"no checkpoint in {tmp_path}: train there first"):
            load_model(str(tmp_path), checkpoint)
    with pytest.raises(UserError, match="only these steps: none"):
        choose_checkpoint(str(tmp_path), 3)
    with pytest.raises(UserError, match=r"--checkpoint=\[2 3\]: specify best, newest or a step"):
        load_model(str(tmp_path), np.array([2, 3]))


def test_load_model_takes_the_best_and_says_so(tmp_path, caplog):
    config = small_config(vocab_size=259)
    models = {step: LanguageModel(config.model, rngs=nnx.Rngs(step)) for step in (2, 3)}
    checkpointer = Checkpointer(
        str(tmp_path), config, ByteTokenizer().to_json(), keep_last=2, keep_best=1
    )
    with contextlib.closing(checkpointer):
        for step, model in models.items():
            params = nnx.state(model, nnx.Param)
            checkpointer.save(step, {"params": params}, {}, Quality(float(step), 7))
    with caplog.at_level("INFO"):
        for checkpoint, step in (("best", 2), ("newest", 3), (3, 3)):
            loaded, tokenizer, loaded_config = load_model(str(tmp_path), checkpoint)
            chex.assert_trees_all_equal(nnx.state(loaded), nnx.state(models[step]))
            assert tokenizer.to_json() == ByteTokenizer().to_json()
            assert loaded_config == config
    assert [text for text in caplog.messages if text.startswith("checkpoint")] == [
        "checkpoint: step 2, the best by validation loss (2.0000 on 7 predictions)"
    ]


LOSSES = {2: 1.5, 3: None, 5: 0.5, 7: 2.5, 11: 0.75, 13: None, 17: 3.5}
EVALUATIONS = {step: None if loss is None else Quality(loss, 7) for step, loss in LOSSES.items()}
OTHER_TOKENS = {2: Quality(0.5, 7), 3: Quality(1.5, 11), 5: Quality(2.5, 11), 7: None}


@pytest.mark.parametrize(
    ("qualities", "keep_last", "keep_best", "kept"),
    [
        (EVALUATIONS, 2, 0, {13, 17}),
        (EVALUATIONS, 2, 1, {5, 13, 17}),
        (EVALUATIONS, 3, 2, {5, 11, 13, 17}),
        (EVALUATIONS, 2, 9, {2, 5, 7, 11, 13, 17}),
        (EVALUATIONS, 9, 0, set(LOSSES)),
        (OTHER_TOKENS, 1, 1, {3, 7}),
        ({2: Quality(1.5, 7), 3: Quality(1.5, 7), 5: None}, 1, 1, {3, 5}),
        ({}, 2, 1, set()),
    ],
)
def test_the_newest_and_the_best_are_kept(qualities, keep_last, keep_best, kept):
    assert steps_to_keep(qualities, keep_last, keep_best) == kept
