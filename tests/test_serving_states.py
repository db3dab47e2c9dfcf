"""The folder of named states, without a server."""

import os

import pytest
from flax import nnx

from simplernn_jax.config import ModelConfig
from simplernn_jax.data.tokenizer import ByteTokenizer
from simplernn_jax.inference import generate, save_state
from simplernn_jax.models import LanguageModel
from simplernn_jax.serving.requests import RequestError
from simplernn_jax.serving.states import StateFolder


def test_a_file_that_is_deleted_while_another_is_written_does_not_count(tmp_path, monkeypatch):
    """Requests that make and delete states at once met it once in thousands."""
    tokenizer = ByteTokenizer()
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, num_layers=1, hidden_dim=8, key_dim=4, value_dim=4,
        num_heads=2, mlp_dim=7,
    )  # fmt: skip
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    file = tmp_path / "first.safetensors"
    save_state(str(file), generate(model, [[1, 2]], max_new_tokens=0).state, model, tokenizer)
    content, scan = file.read_bytes(), os.scandir

    def delete_after_listing(folder):
        entries = list(scan(folder))
        (tmp_path / "gone.safetensors").unlink(missing_ok=True)
        return _Listing(entries)

    def states(max_bytes):
        return StateFolder(str(tmp_path), model, tokenizer, max_bytes)

    (tmp_path / "gone.safetensors").write_bytes(content)
    monkeypatch.setattr(os, "scandir", delete_after_listing)
    assert states(2 * len(content)).put("second", content).num_bytes == len(content)
    assert states(1 << 30).names() == ["first", "second"]
    with pytest.raises(RequestError, match="no room"):
        states(3 * len(content) - 1).put("third", content)


class _Listing(list):
    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass
