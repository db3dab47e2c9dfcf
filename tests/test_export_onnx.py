"""The export to ONNX, in ONNX Runtime."""

import dataclasses
import json

import chex
import numpy as np
import pytest
from export_models import MODELS, trained
from processes import run_python

from simplernn_jax.data.chat_template import ChatTemplate, load_template
from simplernn_jax.export.formats import find_format, logits_of, rounded_weights
from simplernn_jax.inference import Conversation, generate
from simplernn_jax.models.named_weights import model_from_weights, named_weights

onnx = pytest.importorskip("onnx", reason="ONNX is not installed")
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


@pytest.mark.parametrize(("kind", "limit"), [("float16", 1 << 30), ("int8", 0)])
def test_rounded_weights(tmp_path, monkeypatch, kind, limit):
    module = find_format("onnx")
    monkeypatch.setattr(module, "MAX_INLINE_BYTES", limit)
    original = dataclasses.replace(trained(MODELS["hybrid"]), quantize=kind)
    module.write(original, tmp_path)
    rounded = rounded_weights(named_weights(original.model), kind)
    expected = logits_of(model_from_weights(original.model.config, rounded, "here"), TOKENS)
    logits = module.load(tmp_path).logits(TOKENS)
    chex.assert_trees_all_close(logits, expected, atol=2e-5 * np.abs(expected).max())
    assert not np.allclose(expected, logits_of(original.model, TOKENS), atol=1e-6)
    tensors = onnx.load(tmp_path / "decode.onnx").graph.initializer
    matrices = [x for x in tensors if len(x.dims) == 2 and min(x.dims) > 4]
    assert len(matrices) > 10
    stored = onnx.TensorProto.FLOAT16 if kind == "float16" else onnx.TensorProto.INT8
    assert {x.data_type for x in matrices} == {stored}


def test_the_example_answers_a_message(tmp_path):
    original = trained(MODELS["hybrid"], template=load_template("roles"))
    find_format("onnx").write(original, tmp_path)
    template = ChatTemplate(original.config.data.template)
    conversation = Conversation(original.model, original.tokenizer, template)
    answer = conversation.ask("what is 3+4?", max_new_tokens=200)
    (prompt,) = json.loads((tmp_path / "config.json").read_text())["chat"]["first"][:1]
    assert prompt == "\x02"
    result = run_python("example.py", "what is", "3+4?", cwd=tmp_path)
    assert result.output == answer + "\n"
    assert "pip install onnxruntime" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_tokens(tmp_path, name):
    original = trained(MODELS[name])
    find_format("onnx").write(original, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("prefill.onnx", "decode.onnx", "config.json", "tokenizer.json"),
        *("example.py", "README.md"),
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
