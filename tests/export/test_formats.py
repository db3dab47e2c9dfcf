"""Exports of a trained model: what all formats share, and the programs of StableHLO and ONNX."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import sys

import chex
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from processes import ROOT, run_python, run_scripts
from small_data import pretrained, word_level
from small_runs import GLA, MODELS, trained, untrained_run

from simplernn_jax import load_model
from simplernn_jax.data.chat_template import ChatTemplate, load_template
from simplernn_jax.errors import UserError
from simplernn_jax.export import FORMATS
from simplernn_jax.export.exporting import export
from simplernn_jax.export.formats import (
    TrainedModel,
    chat_format,
    compute_logits,
    find_format,
    float32_model,
    rounded_weights,
)
from simplernn_jax.inference import Conversation, generate, generate_text
from simplernn_jax.models import load_fla_checkpoint
from simplernn_jax.models.pytorch_weights import model_from_weights, named_weights

TOKENS = np.random.default_rng(0).integers(0, 256, 89).astype(np.int32)
OF_THE_CONVERTER = pytest.mark.filterwarnings("ignore")  # of PyTorch, to ONNX


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return untrained_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def run(workdir):
    """(model, tokenizer, configuration)."""
    return load_model(str(workdir))


def export_run(run, workdir, out):
    return export("safetensors", *run, str(out), workdir=str(workdir), tokens=TOKENS)


def written(format_name, original, folder):
    """Write an export; load it again."""
    if format_name == "onnx":
        pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    module = find_format(format_name)
    module.write(original, folder)
    return module.load(folder)


def assert_logits(loaded, model):
    expected = compute_logits(model, TOKENS)
    logits = loaded.logits(TOKENS)
    chex.assert_shape(logits, expected.shape)
    chex.assert_trees_all_close(np.float32(logits), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("format_name", "name"),
    [
        *itertools.product(("safetensors", "stablehlo", "html", "onnx"), MODELS),
        *itertools.product(("safetensors", "stablehlo"), ["gla"]),
    ],
)
@OF_THE_CONVERTER
def test_logits_are_those_of_the_model(tmp_path, format_name, name):
    original = trained({**MODELS, "gla": GLA}[name])
    loaded = written(format_name, original, tmp_path)
    for path in tmp_path.iterdir():
        assert str(ROOT).encode() not in path.read_bytes()
        assert b"/site-packages/" not in path.read_bytes()
    assert_logits(loaded, original.model)


def test_bfloat16_models_are_exported_in_float32(tmp_path):
    original = trained({"precision": "bfloat16"})
    model, exact = original.model, float32_model(original.model)
    assert exact.config == dataclasses.replace(model.config, precision="float32")
    chex.assert_trees_all_equal(nnx.state(exact, nnx.Param), nnx.state(model, nnx.Param))
    # What is loaded again is a bfloat16 model, for fine-tuning: it is checked in float32.
    logits = written("safetensors", original, tmp_path).logits(TOKENS)
    np.testing.assert_array_equal(logits, compute_logits(exact, TOKENS))


@pytest.mark.oldest_python
def test_an_export_is_a_model(tmp_path, workdir, run):
    model, tokenizer, config = run
    out = tmp_path / "new" / "folder"
    report = export_run(run, workdir, out)
    assert report.difference < 1e-5
    assert report.num_bytes == sum(path.stat().st_size for path in out.iterdir())
    assert report.loss == report.rounded_loss
    loaded, loaded_tokenizer, loaded_config = load_model(str(out))
    chex.assert_trees_all_equal(nnx.state(loaded, nnx.Param), nnx.state(model, nnx.Param))
    assert loaded_tokenizer.to_json() == tokenizer.to_json()
    assert loaded_config.data.source == "texts"  # no path of this machine
    assert loaded_config.model == config.model
    assert str(tmp_path) not in (out / "simplernn.json").read_text()
    code, output, _ = run_scripts(
        ("scripts/sample.py", "--workdir", out, "--temperature=0", "--max_new_tokens=9")
    )[0]
    assert code == 0
    original = generate(model, [tokenizer.bos_id], max_new_tokens=9, eos_id=tokenizer.eos_id)
    assert output.startswith(tokenizer.decode(original.tokens[0]))


def test_the_example_prints_text_without_this_package(tmp_path):
    original = trained(MODELS["parallel"])
    find_format("stablehlo").write(original, tmp_path)
    prompt = "a prompt of more than 64 bytes, so that both programs are called: é"
    (tmp_path / "simplernn_jax").mkdir()
    (tmp_path / "simplernn_jax" / "__init__.py").write_text("raise ImportError")
    path = os.pathsep.join([str(tmp_path), *filter(os.path.isabs, sys.path)])
    result = run_python("example.py", *prompt.split(), cwd=tmp_path, PYTHONPATH=path)
    assert result.code == 0, result.errors
    (text,) = generate_text(original.model, original.tokenizer, prompt, max_new_tokens=200)
    assert result.output == text + "\n"
    assert "python example.py" in (tmp_path / "README.md").read_text()


def test_a_program_for_all_platforms_without_custom_calls(tmp_path):
    from jax import export as jax_export

    find_format("stablehlo").write(trained(MODELS["hybrid"]), tmp_path)
    for name in ("prefill", "decode"):
        program = jax_export.deserialize(bytearray((tmp_path / f"{name}.bin").read_bytes()))
        assert program.platforms == ("cpu", "cuda", "tpu")
        calls = set(re.findall(r"custom_call @(\w+)", program.mlir_module()))
        assert calls <= {"shape_assertion"}
        tokens = program.in_avals[-1]
        assert str(tokens.shape[0]) == "B"


TRIMS = """{{ bos_token }}{% if messages[0].role != 'system' %}<s>Be brief.</s>{% endif %}
{%- for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""


def test_the_text_around_messages():
    roles = chat_format(load_template("roles"))
    around = ["\x02", "\x04\x03"]
    assert roles == {"first": around, "next": around, "end_of_turn": "\x04", "stop": "\x04"}
    assert chat_format(TRIMS) == {
        "first": ["<s>Be brief.</s><user>", "</user><assistant>"],
        "next": ["<user>", "</user><assistant>"],
        "end_of_turn": "</assistant>",
        "stop": "</assistant>",
    }
    assert chat_format("") is None


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ("m.content | upper", "the template changes messages"),
        ("m.content ~ (loop.index // 4)", "the template changes messages"),
        ("raise_exception('no')", "chat template: no; correct config.data.template"),
    ],
)
def test_a_template_that_is_more_than_text_around_messages(caplog, question, reason):
    template = f"""{{% for m in messages %}}{{{{ m.content if m.role == 'assistant' else
        {question} }}}};{{% endfor %}}"""
    assert chat_format(template) is None
    assert f"this export continues text instead of chatting: {reason}" in caplog.text


@pytest.mark.parametrize(
    ("format_name", "kind"), [("html", "float16"), ("html", "int8"), ("onnx", "float16")]
)
@OF_THE_CONVERTER
def test_rounded_weights(tmp_path, monkeypatch, format_name, kind):
    if format_name == "onnx":  # weights in files of their own
        monkeypatch.setattr(find_format("onnx"), "MAX_INLINE_BYTES", 0)
    original = dataclasses.replace(trained(MODELS["hybrid"]), quantize=kind)
    loaded = written(format_name, original, tmp_path)
    weights = named_weights(original.model)
    rounded = rounded_weights(weights, kind)
    for name, weight in weights.items():
        step = np.abs(weight).max() / 127 if kind == "int8" else np.abs(weight).max() * 2**-11
        assert np.abs(rounded[name] - weight).max() <= step
    model = model_from_weights(original.model.config, rounded, "here")
    assert_logits(loaded, model)
    difference = compute_logits(model, TOKENS) - compute_logits(original.model, TOKENS)
    assert np.abs(difference).max() > 1e-6
    if format_name == "onnx":
        import onnx

        tensors = onnx.load(tmp_path / "decode.onnx").graph.initializer
        matrices = [x for x in tensors if len(x.dims) == 2 and min(x.dims) > 4]
        assert len(matrices) > 10
        assert {x.data_type for x in matrices} == {onnx.TensorProto.FLOAT16}


@OF_THE_CONVERTER
def test_the_example_answers_a_message(tmp_path):
    original = trained(MODELS["hybrid"], template=load_template("roles"))
    written("onnx", original, tmp_path)
    template = ChatTemplate(original.config.data.template)
    conversation = Conversation(original.model, original.tokenizer, template)
    answer = conversation.ask("what is 3+4?", max_new_tokens=200)
    (prompt,) = json.loads((tmp_path / "config.json").read_text())["chat"]["first"][:1]
    assert prompt == "\x02"
    result = run_python("example.py", "what is", "3+4?", cwd=tmp_path)
    assert result.output == answer + "\n"
    assert "pip install onnxruntime" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "fields",
    [{"mixer_options": {}}, {"tie_embeddings": False, "mixer_options": {"min_log_gate": -0.05}}],
)
def test_an_export_of_gla_is_a_checkpoint_of_flash_linear_attention(tmp_path, fields):
    original = trained(GLA | fields)
    find_format("safetensors").write(original, tmp_path)
    again = load_fla_checkpoint(str(tmp_path))
    assert again.config == original.model.config
    chex.assert_trees_all_equal(nnx.state(again, nnx.Param), nnx.state(original.model, nnx.Param))
    for format_name in ("html", "huggingface", "onnx"):
        with pytest.raises(UserError, match=r"not possible with .* model\.mixer='gla'"):
            find_format(format_name).write(original, tmp_path)


@pytest.mark.oldest_python
def test_the_script_exports_a_page(tmp_path, workdir):
    out = tmp_path / "page"
    script = ("scripts/export.py", "--format=html", "--quantize=int8")
    ((code, output, errors),) = run_scripts((*script, "--workdir", workdir, "--out", out))
    assert code == 0, errors
    assert "largest difference of logits" in output
    assert " nats (" in output
    assert [path.name for path in out.iterdir()] == ["model.html"]
    assert [path.name for path in tmp_path.iterdir()] == ["page"]


def test_bad_flags_are_one_line(tmp_path, workdir):
    (tmp_path / "taken").mkdir()
    good = {"workdir": workdir, "format": "safetensors", "out": tmp_path / "out"}
    cases = [
        ({"format": "htm"}, "--format=htm: value should be one of <html|", ""),
        ({"out": tmp_path / "taken"}, "exists already", "specify a new folder"),
        ({"out": "/proc/x/y"}, "--out=", "use another folder"),
        ({"out": "a" * 300}, "File name too long", "use another folder"),
        ({"quantize": "int8"}, "--quantize=int8: only with --format=html", ""),
        ({"out": ""}, "no --out", "specify a new folder"),
    ]
    commands = [
        ("scripts/export.py", *(f"--{name}={value}" for name, value in (good | changed).items()))
        for changed, *_ in cases
    ]
    for (_, *parts), (code, output, errors) in zip(cases, run_scripts(*commands), strict=True):
        assert (code, output) == (2, "")
        last = errors.splitlines()[-1]
        assert last.startswith("error: ")
        assert all(part in last for part in parts), errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for format_name in FORMATS:
        if format_name == "safetensors":
            continue
        with pytest.raises(
            UserError, match=rf"--format={format_name} needs the package [\w-]+: pip install"
        ):
            find_format(format_name).write(trained(MODELS["plain"]), None)


@pytest.mark.parametrize(
    ("name", "result", "problem"),
    [
        ("logits", np.ones((89, 259)), "the exported model differs by"),
        ("encode", [1], "the exported tokenizer encodes the held-out text differently"),
    ],
)
def test_a_wrong_export_leaves_nothing(tmp_path, workdir, run, monkeypatch, name, result, problem):
    monkeypatch.setattr(find_format("safetensors").load, name, lambda *_: result)
    with pytest.raises(UserError, match=problem):
        export_run(run, workdir, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_corrupt_exports_are_rejected(tmp_path, run):
    good = tmp_path / "good"
    good.mkdir()
    find_format("safetensors").write(TrainedModel(*run, "run"), good)
    weights = safetensors.numpy.load_file(good / "model.safetensors")
    name, value = next(iter(weights.items()))
    flipped = bytearray((good / "model.safetensors").read_bytes())
    flipped[-1] ^= 1
    run = json.loads((good / "simplernn.json").read_text())
    changed = json.loads(json.dumps(run))
    changed["config"]["model"]["norm_epsilon"] = 0.5
    unsigned = {name: run[name] for name in ("config", "tokenizer")}  # as other programs write it
    words = json.loads(pretrained(word_level(*map(str, range(296)))).to_json())
    damages = {
        "model.safetensors": [
            (b"", "cannot be read"),
            (bytes(flipped), "corrupted, or changed by"),
            (safetensors.numpy.save(weights | {name: value[:-1]}), "has shape"),
        ],
        "simplernn.json": [
            (json.dumps(changed).encode(), "differs from what was"),
            (json.dumps(unsigned | {"weights_sha256": "0"}).encode(), "weights of another model"),
            (json.dumps(unsigned | {"tokenizer": words}).encode(), "has 300 ids and the model 259"),
        ],
    }
    for file, contents in damages.items():
        for content, problem in contents:
            shutil.copytree(good, tmp_path / "bad")
            (tmp_path / "bad" / file).write_bytes(content)
            with pytest.raises(UserError, match=problem):
                load_model(str(tmp_path / "bad"))
            shutil.rmtree(tmp_path / "bad")
