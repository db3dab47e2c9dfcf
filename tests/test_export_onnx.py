"""The export to ONNX, in ONNX Runtime."""

import json

import chex
import numpy as np
import pytest
from export_models import MODELS, trained

from simplernn_jax.export.formats import find_format, logits_of
from simplernn_jax.inference import generate

onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of PyTorch's converter
TOKENS = np.random.default_rng(0).integers(0, 256, 89).astype(np.int32)


def test_large_weights_are_files_of_their_own(tmp_path, monkeypatch):
    module = find_format("onnx")
    monkeypatch.setattr(module, "MAX_INLINE_BYTES", 0)
    original = trained(MODELS["plain"])
    module.write(original, tmp_path)
    assert (tmp_path / "prefill.onnx.data").stat().st_size > 0
    expected = logits_of(original.model, TOKENS)
    logits = module.load(tmp_path).logits(TOKENS)
    chex.assert_trees_all_close(logits, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens(tmp_path, name):
    original = trained(MODELS[name])
    find_format("onnx").write(original, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("prefill.onnx", "decode.onnx", "config.json")
    }
    loaded = find_format("onnx").load(tmp_path)
    expected = logits_of(original.model, TOKENS)
    chex.assert_trees_all_close(loaded.logits(TOKENS), expected, atol=2e-5 * np.abs(expected).max())
    tokens = generate(original.model, [5], max_new_tokens=31).tokens[0].tolist()
    assert loaded.greedy(5, 31) == tokens
    config = json.loads((tmp_path / "config.json").read_text())
    session = onnxruntime.InferenceSession(tmp_path / "decode.onnx")
    assert [x.name for x in session.get_inputs()] == ["tokens", *config["state"]]
    names = ["logits", *(f"next.{name}" for name in config["state"])]
    assert [x.name for x in session.get_outputs()] == names
    for path in tmp_path.iterdir():
        assert b"/site-packages/" not in path.read_bytes()
