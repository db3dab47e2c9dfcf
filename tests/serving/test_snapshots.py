"""The prefix cache in a folder."""

import jax
import numpy as np
import pytest
from references import needs_compiler
from small_runs import small_model

from simplernn_jax.data.tokenizer import ByteTokenizer
from simplernn_jax.inference.engine import PrefixState
from simplernn_jax.inference.state import empty_state, encode_state
from simplernn_jax.serving.prefill import PrefixKeys
from simplernn_jax.serving.scheduler import Scheduler
from simplernn_jax.serving.snapshots import STATES_PER_FILE, load_cache, save_cache

pytestmark = needs_compiler
COUNT = STATES_PER_FILE + 3


@pytest.fixture(scope="module")
def model():
    return small_model("residual")


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


def test_states_are_loaded_in_their_order(saved, model):
    scheduler, folder = saved
    expected = bytes_of(scheduler.cache)
    assert loaded(folder, model) == expected
    fewer = loaded(folder, model, scheduler.cache.num_bytes // 2)
    assert fewer == expected[-len(fewer) :]
    scheduler.cache.evict(scheduler.cache.num_bytes // 2)
    save_cache(folder, scheduler, ByteTokenizer())
    assert loaded(folder, model) == fewer


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
    assert not loaded(folder, small_model("residual", vocab_size=31))


def test_a_cache_that_cannot_be_saved_is_only_a_warning(saved, tmp_path, caplog):
    (tmp_path / "file").touch()
    save_cache(tmp_path / "file", saved[0], ByteTokenizer())
    assert "file: the prefix cache cannot be saved (File exists)" in caplog.text
