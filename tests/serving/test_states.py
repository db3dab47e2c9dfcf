"""Named states and the prefix cache in folders."""

import errno
import os
from unittest import mock

import jax
import numpy as np
import pytest
from references import needs_compiler
from small_runs import small_model

from simplernn_jax.data.tokenizer import ByteTokenizer
from simplernn_jax.inference import generate, save_state
from simplernn_jax.inference.engine import PrefixState
from simplernn_jax.inference.state import empty_state, encode_state
from simplernn_jax.serving.prefill import PrefixKeys
from simplernn_jax.serving.requests import RequestError
from simplernn_jax.serving.scheduler import Scheduler
from simplernn_jax.serving.states import STATES_PER_FILE, StateFolder, load_cache, save_cache

COUNT = STATES_PER_FILE + 3


@pytest.fixture(scope="module")
def model():
    return small_model("parallel")


@pytest.fixture
def folder(model, tmp_path):
    """A folder with the state ``first``, of one with the room for two, and the file's content."""
    tokenizer = ByteTokenizer()
    file = tmp_path / "first.safetensors"
    save_state(str(file), generate(model, [[1, 2]], max_new_tokens=0).state, model, tokenizer)
    content = file.read_bytes()
    return StateFolder(str(tmp_path), model, tokenizer, 2 * len(content)), content


def test_states_have_a_joint_limit(folder, tmp_path):
    states, content = folder
    (tmp_path / ".0123.tmp").write_bytes(content * 9)  # what a killed process left takes no room
    assert states.put("second", content).description["bytes"] == len(content)
    with pytest.raises(RequestError, match="no room") as full:
        states.put("third", content)
    assert full.value.status == 507
    (tmp_path / "third.safetensors").write_bytes(content[:-1])  # corrupt: not listed
    assert [state["id"] for state in states.descriptions()] == ["first", "second"]
    states.delete("first")
    with pytest.raises(RequestError) as taken:
        states.put("second", content)
    assert taken.value.status == 409


def test_an_error_of_the_machine_is_not_a_missing_state(folder, monkeypatch):
    states, _ = folder
    with pytest.raises(RequestError) as missing:
        states.read("other")
    assert missing.value.status == 404
    fail = mock.Mock(side_effect=OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
    monkeypatch.setattr("simplernn_jax.serving.states.read_file", fail)
    with pytest.raises(OSError, match="Too many open files"):
        states.descriptions()


def loaded(folder, model, max_bytes=1 << 24):
    """Keys and bytes of the states that a new scheduler finds in `folder`."""
    scheduler = Scheduler(model, 1, max_bytes)
    load_cache(folder, scheduler, ByteTokenizer())
    return bytes_of(scheduler.cache)


def bytes_of(cache):
    return [(k, [np.asarray(x).tobytes() for x in jax.tree.leaves(s)]) for k, s in cache.entries()]


@pytest.fixture
def saved(model, tmp_path):
    """A scheduler whose cache is saved, and the folder."""
    scheduler, random = Scheduler(model, 1, 1 << 24), np.random.default_rng(0)
    empty = empty_state(model, 1)
    state = PrefixState(empty.layers, empty.logits)
    keys = PrefixKeys(bytes(32), np.arange(COUNT, dtype=np.int32))
    for position in range(1, COUNT + 1):
        other = jax.tree.map(lambda x: random.normal(size=x.shape).astype(x.dtype), state)
        scheduler.cache.add(keys.at(position), other)
    save_cache(tmp_path / "cache", scheduler, ByteTokenizer())
    return scheduler, tmp_path / "cache"


@needs_compiler
def test_states_are_loaded_in_their_order(saved, model):
    scheduler, folder = saved
    expected = bytes_of(scheduler.cache)
    assert loaded(folder, model) == expected
    fewer = loaded(folder, model, scheduler.cache.num_bytes // 2)
    assert fewer == expected[-len(fewer) :]
    scheduler.cache.evict(scheduler.cache.num_bytes // 2)
    save_cache(folder, scheduler, ByteTokenizer())
    assert loaded(folder, model) == fewer


@needs_compiler
def test_files_that_cannot_be_used_are_ignored(saved, model, caplog):
    scheduler, folder = saved
    first, second = sorted(folder.iterdir())
    content = first.read_bytes()
    first.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (folder / "000000200.safetensors").symlink_to(second)
    other_owner = encode_state(empty_state(model, 1), {"model": "", "tokenizer": ""}, keys="00")
    (folder / "000000300.safetensors").write_bytes(other_owner)
    assert loaded(folder, model) == bytes_of(scheduler.cache)[STATES_PER_FILE:]
    (warning,) = caplog.messages
    assert "3 files of the prefix cache ignored" in warning
    assert "corrupted" in warning
    assert not loaded(folder, small_model("parallel", vocab_size=31))


@needs_compiler
def test_a_cache_folder_that_is_a_link_is_left_alone(saved, model, tmp_path, caplog):
    scheduler, folder = saved
    (tmp_path / "link").symlink_to(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    save_cache(tmp_path / "link", scheduler, ByteTokenizer())
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert "cannot be saved" in caplog.text
    assert not loaded(tmp_path / "link", model)


@needs_compiler
def test_a_cache_that_cannot_be_saved_is_only_a_warning(saved, tmp_path, caplog):
    (tmp_path / "file").touch()
    save_cache(tmp_path / "file", saved[0], ByteTokenizer())
    assert "file: the prefix cache cannot be saved (File exists)" in caplog.text
