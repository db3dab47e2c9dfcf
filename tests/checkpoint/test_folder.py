"""Choice of the checkpoints to use and to keep, and manifests: every change to one shows."""

import contextlib
import errno
import functools
import os
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from corrupt_files import put_odd_file
from small_runs import small_config

from simplernn_jax import load_model
from simplernn_jax.checkpoint.checkpointer import Checkpointer
from simplernn_jax.checkpoint.folder import (
    CheckpointFolder,
    Quality,
    choose_checkpoint,
    find_corruption,
    read_config,
    steps_to_keep,
    write_manifest,
)
from simplernn_jax.data.tokenizer import ByteTokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.files import open_file, write_sealed


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
        ({"s2": (2.5, 7), "s3": (2.7, 11), "s5": (2.6, 11), "s7": None}, 5, "step 5, the best by"),
        ({"s2": None, "s3": None}, 3, "step 3, the newest (none was evaluated)"),
    ],
)
def test_the_best_is_used_of_those_evaluated_on_the_same_tokens(
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


LOSSES = {2: 1.5, 3: None, 5: 0.5, 7: 2.5, 11: 0.75, 13: None, 17: 3.5}
EVALUATIONS = {step: None if loss is None else Quality(loss, 7) for step, loss in LOSSES.items()}
OTHER_TOKENS = {2: Quality(0.5, 7), 3: Quality(1.5, 11), 5: Quality(2.5, 11), 7: None}


@pytest.mark.parametrize(
    ("qualities", "keep_last", "keep_best", "kept"),
    [
        (EVALUATIONS, 2, 0, {13, 17}),
        (EVALUATIONS, 3, 2, {5, 11, 13, 17}),
        (OTHER_TOKENS, 1, 1, {3, 7}),
        ({2: Quality(1.5, 7), 3: Quality(1.5, 7), 5: None}, 1, 1, {3, 5}),
        ({}, 2, 1, set()),
    ],
)
def test_the_newest_and_the_best_are_kept(qualities, keep_last, keep_best, kept):
    assert steps_to_keep(qualities, keep_last, keep_best) == kept


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inner" / "empty").mkdir(parents=True)
    (tmp_path / "inner" / "first file").write_bytes(bytes(range(256)) * 7)
    (tmp_path / "inner" / "nothing").write_bytes(b"")
    (tmp_path / "last").write_bytes(b"\n\r\n")
    write_manifest(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["manifest.sha256", "last"])
def test_an_error_of_the_machine_is_not_corruption(folder, monkeypatch, name):
    def reject(path, **options):
        if os.path.basename(path) == name:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        return open_file(path, **options)

    for module in ("files", "checkpoint.folder"):
        monkeypatch.setattr(f"simplernn_jax.{module}.open_file", reject)
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        find_corruption(str(folder))


def test_every_flipped_bit_and_every_truncation_of_the_manifest_shows(folder):
    path = folder / "manifest.sha256"
    whole = path.read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        for damaged in (flipped, whole[:position]):
            path.write_bytes(damaged)
            assert find_corruption(str(folder)) == "manifest.sha256 is missing or was changed"


@pytest.mark.parametrize(
    ("name", "change", "damage"),
    [
        ("inner/first file", lambda path: path.write_bytes(bytes(256 * 7)), "was changed"),
        ("last", lambda path: path.write_bytes(b"\n\r"), "has 2 bytes instead of 3"),
        ("inner/nothing", lambda path: path.unlink(), "is missing"),
        ("inner/empty/other", lambda path: path.write_bytes(b""), "does not belong there"),
        ("last", functools.partial(put_odd_file, "folder"), "is missing"),
    ],
)
def test_a_corrupt_file_is_named(folder, name, change, damage):
    change(folder / name)
    assert find_corruption(str(folder)) == f"{name} {damage}"


def test_bytes_outside_the_given_parts_are_not_verified(folder):
    (folder / "last").write_bytes(b"\n\n\n")
    assert find_corruption(str(folder), ["inner"]) is None
    assert find_corruption(str(folder)) == "last was changed"
    (folder / "inner" / "first file").write_bytes(bytes(256 * 7))
    assert find_corruption(str(folder), ["inner"]) == "inner/first file was changed"


def test_a_malformed_manifest_is_corruption(folder):
    write_sealed(folder / "manifest.sha256", "a line\n")
    assert find_corruption(str(folder)) == "manifest.sha256 is malformed"


def test_a_corrupt_or_unreadable_checkpoint_is_never_pruned(tmp_path, monkeypatch, caplog):
    save(tmp_path, s2=(2.0, 7), s3=(3.0, 7), s5=(2.5, 7), s7=(2.5, 7))
    checkpoints = CheckpointFolder(str(tmp_path))
    damage(tmp_path, 2, "quality")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", mock.Mock(side_effect=OSError(errno.EIO, "failed")))
        checkpoints.prune(1, 0)
    assert "old checkpoints are kept" in caplog.text
    assert checkpoints.steps() == [2, 3, 5, 7]
    checkpoints.prune(1, 0)
    assert checkpoints.steps() == [2, 7]


@pytest.mark.parametrize("kind", ["fifo", "endless"])
def test_pipes_and_devices_are_corruption_without_a_hang(folder, kind):
    put_odd_file(kind, folder / "inner" / "nothing")  # of the right size, by its status
    expected = "inner/nothing cannot be read (not a regular file)"
    assert find_corruption(str(folder)) == expected
