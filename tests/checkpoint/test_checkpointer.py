"""Saving and restoring a run through `Checkpointer`."""

import contextlib
import errno
import gc
import os
import shutil
import threading
from pathlib import Path
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from corrupt_files import flip_bit
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from references import assert_same_bytes
from small_runs import HYBRID, mesh_of, untrained_run

from simplernn_jax import load_model
from simplernn_jax.checkpoint import folder
from simplernn_jax.checkpoint.checkpointer import Checkpointer
from simplernn_jax.checkpoint.folder import Quality, check_workdir, read_config
from simplernn_jax.config import Config, ModelConfig, TrainConfig
from simplernn_jax.errors import UserError

TOKENIZER = '{"kind": "char", "alphabet": "añ\\u2713"}'


def make_state(seed):
    """Return a stand-in for the training state, with every dtype that a run may save."""
    params = nnx.state(nnx.Linear(3, 5, rngs=nnx.Rngs(seed)), nnx.Param)
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "step": jnp.int32(seed),
        "params": params,
        "opt_state": optax.adamw(1e-3).init(params),
        "rng": jax.random.key_data(keys[0]),
        "carried": (jax.random.normal(keys[1], (2, 1, 3, 7)),),
        "extra": {
            "half": jax.random.normal(keys[2], (11,), jnp.bfloat16),
            "flags": jnp.array([True, False, True]),
            "odd": jnp.array([jnp.nan, -0.0, 1e-45, jnp.inf], jnp.float32),
        },
    }


def abstract_state():
    return jax.eval_shape(lambda: make_state(0))


def config(**model: int) -> Config:
    return Config(model=ModelConfig(**model), train=TrainConfig(steps=10))


def open_checkpointer(
    workdir: Path, keep_last: int = 2, keep_best: int = 0
) -> contextlib.closing[Checkpointer]:
    return contextlib.closing(
        Checkpointer(str(workdir), config(), TOKENIZER, keep_last=keep_last, keep_best=keep_best)
    )


def save_steps(workdir: Path, *steps: int) -> None:
    with open_checkpointer(workdir) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), {"next_index": step})


def restore(workdir: Path):
    with open_checkpointer(workdir) as checkpointer:
        return checkpointer.restore(abstract_state())


def assert_restores(workdir: Path, step: int) -> None:
    assert_same_bytes(restore(workdir)[0], make_state(step))


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def test_restores_every_byte(tmp_path):
    save_steps(tmp_path, 3)
    state, data_state, saved_config = restore(tmp_path)
    assert (data_state, saved_config) == ({"next_index": 3}, config())
    assert read_config(str(tmp_path)) == (config(), TOKENIZER, 3)
    assert_same_bytes(state, make_state(3))


DATA, BOTH, ONE = ({"data": 4}, {"fsdp": 2, "tensor": 4}, {"data": 1})


@pytest.mark.parametrize(
    ("mesh", "kernel", "bias"),
    [(BOTH, P("tensor", "fsdp"), P()), (DATA, P(None, "data"), P("data")), (ONE, P(), P())],
)
def test_a_state_saved_on_one_mesh_is_restored_on_another(tmp_path, mesh, kernel, bias):
    values = {
        "kernel": np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32),
        "bias": np.array([jnp.nan, -0.0, 1e-45, jnp.inf], np.float32),
    }

    def shardings(mesh, **specs):
        return {name: NamedSharding(mesh_of(**mesh), spec) for name, spec in specs.items()}

    saved = shardings(DATA, kernel=P("data"), bias=P())
    wanted = shardings(mesh, kernel=kernel, bias=bias)
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, jax.device_put(values, saved), {})
    with open_checkpointer(tmp_path) as checkpointer:
        abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in values.items()}
        sharded = checkpointer.restore(abstract, wanted)[0]
        single = checkpointer.restore(abstract)[0]
    assert_same_bytes(sharded, values)
    assert_same_bytes(single, values)
    for name in values:
        assert sharded[name].sharding == wanted[name]
        # JAX owns the memory: a step may be given it.
        jax.jit(jnp.negative, donate_argnums=0)(sharded[name])
        assert sharded[name].is_deleted()


def test_a_save_in_the_background_keeps_the_values_of_its_step(tmp_path):
    advance = jax.jit(lambda values: values + 1, donate_argnums=0)
    values = jnp.zeros(300_007)
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"values": values}, {})
        for _ in range(20):
            values = advance(values)
    with open_checkpointer(tmp_path) as checkpointer:
        abstract = {"values": jax.ShapeDtypeStruct((300_007,), jnp.float32)}
        state, _, _ = checkpointer.restore(abstract)
    chex.assert_trees_all_equal(state["values"], jnp.zeros(300_007))


def test_keeps_the_newest_and_the_best_also_after_a_restart(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 4.0}
    with open_checkpointer(tmp_path, keep_best=1) as checkpointer:
        for step, loss in losses.items():
            checkpointer.save(step, make_state(step), {}, Quality(loss, 7) if loss else None)
    assert steps_in(tmp_path / "checkpoints") == [2, 4, 5]
    with open_checkpointer(tmp_path, keep_best=1) as checkpointer:
        checkpointer.restore(abstract_state())
        checkpointer.save(6, make_state(6), {})
        checkpointer.save(7, make_state(7), {}, Quality(0.5, 7))
    assert steps_in(tmp_path / "checkpoints") == [6, 7]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["6", "7", "lock"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    save_steps(folder, 1, 2)
    return folder


@pytest.fixture
def two_steps(saved, tmp_path):
    """A copy of them in `tmp_path`."""
    return shutil.copytree(saved, tmp_path, dirs_exist_ok=True)


@pytest.mark.parametrize("name", ["manifest.sha256", "state/manifest.ocdbt", "quality/metadata"])
def test_a_corrupt_checkpoint_is_moved_aside_for_the_one_before(two_steps, caplog, name):
    flip_bit(two_steps / "checkpoints" / "2" / name)
    assert_restores(two_steps, 1)
    assert steps_in(two_steps / "checkpoints") == [1]
    assert steps_in(two_steps / "checkpoints_damaged") == [2]
    assert f"checkpoints/2 is corrupted: {name} " in caplog.text


def test_does_not_start_over_when_no_checkpoint_is_intact(two_steps):
    for step in "12":
        flip_bit(two_steps / "checkpoints" / step / "manifest.sha256")
    for _ in range(2):
        with pytest.raises(UserError, match=r"no intact checkpoint is left .* restore an intact"):
            restore(two_steps)
    with pytest.raises(UserError, match="no intact checkpoint is left"):
        read_config(str(two_steps))


def leave_unfinished(workdir: Path, step: int) -> None:
    """Leave the folders of a kill between Orbax's rename and the manifest, and of one before."""
    for name in (f"{step}.unfinished", f"{step + 1}.unfinished.orbax-checkpoint-tmp"):
        (workdir / "checkpoints" / name / "state").mkdir(parents=True)


def test_an_unfinished_save_is_discarded_without_alarm(tmp_path, caplog):
    save_steps(tmp_path, 1)
    leave_unfinished(tmp_path, 2)
    with open_checkpointer(tmp_path) as checkpointer:
        assert_same_bytes(checkpointer.restore(abstract_state())[0], make_state(1))
        checkpointer.save(2, make_state(2), {})
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2", "lock"]
    assert not (tmp_path / "checkpoints_damaged").exists()
    assert "corrupted" not in caplog.text
    assert_restores(tmp_path, 2)


def test_a_disk_that_fills_up_during_a_save_loses_nothing_earlier(tmp_path, monkeypatch):
    refuse = mock.Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    save_steps(tmp_path, 1)
    with open_checkpointer(tmp_path) as checkpointer, monkeypatch.context() as patch:
        patch.setattr(folder, "write_manifest", refuse)
        checkpointer.save(2, make_state(2), {})
        with pytest.raises(UserError, match=rf"step 2 .*{tmp_path}/checkpoints: No space left"):
            checkpointer.save(3, make_state(3), {})
        assert not list((tmp_path / "checkpoints").glob("2*"))
        patch.setattr(folder, "write_manifest", mock.Mock(side_effect=TimeoutError("late")))
        with pytest.raises(UserError, match="step 3 could not be saved"):
            checkpointer.save(3, make_state(3), {}, wait=True)
    assert steps_in(tmp_path / "checkpoints") == [1]
    assert_restores(tmp_path, 1)


def test_a_folder_that_the_disk_rejects_leaves_no_thread(tmp_path, monkeypatch):
    """A thread that waits for it would keep the process from ending."""

    def refuse(path, *arguments, **options):
        if Path(path).name == "2.unfinished.orbax-checkpoint-tmp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        make(path, *arguments, **options)

    make, before = os.mkdir, set(threading.enumerate())
    with open_checkpointer(tmp_path) as checkpointer, monkeypatch.context() as patch:
        checkpointer.save(1, make_state(1), {}, wait=True)
        patch.setattr(os, "mkdir", refuse)
        with pytest.raises(UserError, match=rf"step 2 .*{tmp_path}/checkpoints: No space left"):
            checkpointer.save(2, make_state(2), {}, wait=True)
    gc.collect()  # collects event loops; their idle threads then end
    left = [thread for thread in set(threading.enumerate()) - before if not thread.daemon]
    for thread in left:
        thread.join(timeout=30)
    assert [thread for thread in left if thread.is_alive()] == []
    assert_restores(tmp_path, 1)


def test_another_optimizer_is_named(two_steps):
    state = make_state(0)
    state["opt_state"] = optax.sgd(1e-3, momentum=0.9).init(state["params"])
    with (
        open_checkpointer(two_steps) as checkpointer,
        pytest.raises(UserError, match=r"does not match.*opt_state/0/trace/\S+ is float32\[5\], "),
    ):
        checkpointer.restore(state)


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    no_locks = OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr("fcntl.flock", mock.Mock(side_effect=no_locks))
    save_steps(tmp_path, 1)
    assert "this file system has no locks" in caplog.text
    assert_restores(tmp_path, 1)


def test_only_one_process_trains_in_a_workdir(tmp_path):
    with open_checkpointer(tmp_path), pytest.raises(UserError, match="another process is training"):
        open_checkpointer(tmp_path)
    assert restore(tmp_path) is None


@pytest.mark.parametrize("name", ["run [2]", "back\\slash", "gs:", "logs:/a", "gs://a", "\udcff"])
def test_a_path_that_cannot_be_saved_to_is_rejected_before_anything_is_made(tmp_path, name):
    workdir = name if "://" in name else str(tmp_path / name)
    with pytest.raises(UserError, match=r"^workdir=.*; (rename|mount) "):
        check_workdir(workdir)
    with pytest.raises(UserError, match=r"^workdir="):
        Checkpointer(workdir, config(), TOKENIZER, keep_last=2, keep_best=0)
    assert list(tmp_path.iterdir()) == []


def test_load_model_under_x64(tmp_path):
    run = str(untrained_run(tmp_path, **HYBRID))
    expected, tokenizer, _ = load_model(run)
    with jax.enable_x64(True):
        model = load_model(run)[0]
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
        tokens = jnp.array([[tokenizer.bos_id, 3, 5, 7]])
        forward = nnx.jit(lambda model, tokens: model(tokens)[0])
        chex.assert_trees_all_close(forward(model, tokens), forward(expected, tokens), atol=1e-5)
