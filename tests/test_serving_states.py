"""The folder of named states, without a server."""

import contextlib
import os

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
