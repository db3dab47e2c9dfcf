"""The folder of named states, without a server."""

import contextlib
import errno
import os
from unittest import mock

import pytest
from small_runs import small_model

from simplernn_jax.data.tokenizer import ByteTokenizer
from simplernn_jax.inference import generate, save_state
from simplernn_jax.serving.requests import RequestError
from simplernn_jax.serving.states import StateFolder


def test_a_file_that_is_deleted_while_another_is_written_does_not_count(tmp_path, monkeypatch):
    """Requests that make and delete states at once met it once in thousands."""
    tokenizer, model = ByteTokenizer(), small_model("residual")
    file = tmp_path / "first.safetensors"
    save_state(str(file), generate(model, [[1, 2]], max_new_tokens=0).state, model, tokenizer)
    content, scan = file.read_bytes(), os.scandir

    def delete_after_listing(folder):
        entries = list(scan(folder))
        (tmp_path / "gone.safetensors").unlink(missing_ok=True)
        return contextlib.nullcontext(entries)

    def states(max_bytes):
        return StateFolder(str(tmp_path), model, tokenizer, max_bytes)

    (tmp_path / "gone.safetensors").write_bytes(content)
    monkeypatch.setattr(os, "scandir", delete_after_listing)
    assert states(2 * len(content)).put("second", content).num_bytes == len(content)
    assert states(1 << 30).names() == ["first", "second"]
    with pytest.raises(RequestError, match="no room"):
        states(3 * len(content) - 1).put("third", content)


def test_an_error_of_the_machine_is_not_a_missing_state(tmp_path, monkeypatch):
    tokenizer, model = ByteTokenizer(), small_model("residual")
    states = StateFolder(str(tmp_path), model, tokenizer, 1 << 30)
    with pytest.raises(RequestError) as missing:
        states.read("first")
    assert missing.value.status == 404
    refuse = mock.Mock(side_effect=OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
    monkeypatch.setattr("simplernn_jax.serving.states.read_file", refuse)
    with pytest.raises(RequestError, match="Too many open files") as failed:
        states.read("first")
    assert failed.value.status == 503


def test_what_a_killed_process_left_takes_no_room(tmp_path):
    tokenizer, model = ByteTokenizer(), small_model("residual")
    file = tmp_path / "first.safetensors"
    save_state(str(file), generate(model, [[1, 2]], max_new_tokens=0).state, model, tokenizer)
    content = file.read_bytes()
    (tmp_path / ".0123.tmp").write_bytes(content * 9)
    states = StateFolder(str(tmp_path), model, tokenizer, 2 * len(content))
    assert states.put("second", content).num_bytes == len(content)
