"""The folder of named states, without a server."""

import errno
import os
from unittest import mock

import pytest
from small_runs import small_model

from simplernn_jax.data.tokenizer import ByteTokenizer
from simplernn_jax.inference import generate, save_state
from simplernn_jax.serving.requests import RequestError
from simplernn_jax.serving.states import StateFolder


@pytest.fixture
def folder(tmp_path):
    """A folder with the state ``first``, of one with the room for two, and the file's content."""
    tokenizer, model = ByteTokenizer(), small_model("residual")
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
