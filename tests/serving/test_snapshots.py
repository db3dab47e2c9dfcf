"""The prefix cache in a folder."""

import dataclasses

import jax
import numpy as np
import pytest
from references import needs_compiler
from small_runs import small_model

from simplernn_jax.data.tokenizer import ByteTokenizer
from simplernn_jax.inference.engine import PrefixState
from simplernn_jax.inference.state import empty_state, encode_state
from simplernn_jax.serving.prefill import PrefixCache, PrefixKeys
from simplernn_jax.serving.snapshots import STATES_PER_FILE, load_cache, save_cache

pytestmark = needs_compiler
COUNT = STATES_PER_FILE + 3


@pytest.fixture(scope="module")
def model():
    return small_model("residual")


def loaded(folder, model, max_bytes=1 << 24):
    cache = PrefixCache(max_bytes)
    load_cache(folder, cache, model, ByteTokenizer())
    return cache


@pytest.fixture
def saved(model, tmp_path):
    """A saved cache, and its folder."""
    cache, random = PrefixCache(1 << 24), np.random.default_rng(0)
    empty = empty_state(model, 1)
    state = PrefixState(empty.layers, empty.logits)
    keys = PrefixKeys(bytes(32), np.arange(COUNT, dtype=np.int32))
    for position in range(1, COUNT + 1):
        other = jax.tree.map(lambda x: random.normal(size=x.shape).astype(x.dtype), state)
        cache.add(keys.at(position), other)
    save_cache(tmp_path / "cache", cache, model, ByteTokenizer())
    return cache, tmp_path / "cache"


def bytes_of(cache):
    return [(k, [np.asarray(x).tobytes() for x in jax.tree.leaves(s)]) for k, s in cache.entries()]


def test_states_are_loaded_in_their_order(saved, model):
    cache, folder = saved
    assert bytes_of(loaded(folder, model)) == bytes_of(cache)
    fewer = loaded(folder, model, cache.num_bytes // 2)
    assert bytes_of(fewer) == bytes_of(cache)[-len(fewer.entries()) :]
    save_cache(folder, fewer, model, ByteTokenizer())
    assert bytes_of(loaded(folder, model)) == bytes_of(fewer)


def test_files_that_cannot_be_used_are_ignored(saved, model, tmp_path, caplog):
    cache, folder = saved
    first, second = sorted(folder.iterdir())
    content = first.read_bytes()
    first.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (folder / "000000200.safetensors").symlink_to(second)
    # A state that is complete, but whose model is another one.
    state = dataclasses.replace(empty_state(model, 1))
    crafted = encode_state(state, {"model": "", "tokenizer": ""}, keys="00")
    (folder / "000000300.safetensors").write_bytes(crafted)
    assert bytes_of(loaded(folder, model)) == bytes_of(cache)[STATES_PER_FILE:]
    (warning,) = caplog.messages
    assert "3 files of the prefix cache ignored" in warning
    assert "corrupted" in warning
    other = small_model("residual")
    other.embedding.embedding.set_value(2 * other.embedding.embedding[...])
    assert not loaded(folder, other).entries()


def test_a_folder_elsewhere_is_left_alone(saved, model, tmp_path, caplog):
    _, folder = saved
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "file").write_bytes(b"")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for name in ("link", "file"):
        save_cache(tmp_path / name, PrefixCache(0), model, ByteTokenizer())
        assert not loaded(tmp_path / name, model).entries()
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert sum("cannot be saved" in message for message in caplog.messages) == 2
