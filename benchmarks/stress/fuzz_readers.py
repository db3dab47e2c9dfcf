"""Readers of what runs write, of requests and of arguments, for `fuzz`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax import nnx

from simplernn_jax import config as config_lib
from simplernn_jax.checkpoint import manifest
from simplernn_jax.checkpoint.contents import read_texts, saved_quality, saved_step
from simplernn_jax.checkpoint.folder import CheckpointFolder
from simplernn_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from simplernn_jax.data.chat_template import ChatTemplate, load_template, messages_of
from simplernn_jax.data.store_folder import META_FILE, DamagedStore, open_store
from simplernn_jax.data.token_store import prepare_corpus
from simplernn_jax.errors import UserError
from simplernn_jax.inference import arguments, generate, load_state, save_state
from simplernn_jax.inference.loading import RUN, read_run, run_json
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.gla_checkpoint import load_gla_checkpoint, to_fla_config
from simplernn_jax.models.named_weights import named_weights
from simplernn_jax.models.pytorch_weights import encode_weights, read_pytorch_weights
from simplernn_jax.serving import requests
from simplernn_jax.serving.service import Service
from simplernn_jax.serving.states import StateFolder
from simplernn_jax.training.loss_curve import loss_curves, loss_limits
from simplernn_jax.training.metrics import FILE_NAME, encode, read_metrics

from .fuzz_data import ALPACA, BYTES, CHAT, CHATML, SHAREGPT, TEXT, Reader, as_text, of_file

_SAMPLING = {
    "model": "m", "n": 2, "stream": True, "stream_options": {"include_usage": True},
    "stop": ["a", "bc"], "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1,
    "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.5,
    "logit_bias": {"97": 2.5}, "seed": 7, "stop_token_ids": [3], "banned_token_ids": [4],
    "ignore_eos": True, "user": "u",
}  # fmt: skip
_ROLES = ChatTemplate(load_template("roles"))


def run_readers(folder: Path) -> list[Reader]:
    """All readers of what runs write; their files are in `folder`."""
    return [*_checkpoint_readers(folder), *_model_readers(folder)]


def _checkpoint_readers(folder: Path) -> list[Reader]:
    """Readers of the parts of a checkpoint, of metrics, and of a tokenized corpus."""
    config = config_lib.to_json(_config(ModelConfig())).encode()
    quality = b'{"step": 3, "validation_loss": 2.5, "predictions": 7}'
    items = {"config": config, "tokenizer": json.dumps(BYTES.to_json()).encode()}
    items["quality"] = quality
    sealed = folder / "run" / "checkpoints" / "3" / manifest.MANIFEST_NAME
    loose = folder / "loose"
    for name, content in items.items():
        for checkpoint in (sealed.parent, loose):
            (checkpoint / name).mkdir(parents=True)
            (checkpoint / name / "metadata").write_bytes(content)
    manifest.write_manifest(str(sealed.parent))
    run = CheckpointFolder(str(folder / "run"))
    run.update_ledger()
    original = sealed.read_bytes()
    rows: list[dict[str, Any]] = [{"step": 1, "kind": "train", "loss": 2.5, "seconds": 0.1}]
    rows += [{"step": 2, "kind": "validation", "loss": None}, {"step": 2, "kind": "sample"}]
    source = folder / "corpus.txt"
    source.write_text(TEXT * 9, encoding="utf-8")
    data = DataConfig(source=str(source), split="position")
    prepare_corpus(data, 0, str(folder / "tokens"), tokenizer=BYTES, show_progress=False)
    (record,) = (folder / "tokens").glob(f"*/{META_FILE}")

    def verify() -> None:
        is_same = sealed.read_bytes() == original
        assert (run.find_corruption(3) is None) == is_same, "a changed manifest is accepted"
        sealed.write_bytes(original)

    def metrics() -> None:
        rows = read_metrics(str(folder))
        curves = loss_curves(rows)
        loss_limits(curves.train, curves.validation)
        for row in rows:
            encode(row)

    def corpus() -> None:
        try:
            open_store(record.parent)
        except DamagedStore as error:
            raise UserError(str(error)) from error

    def read_quality() -> None:
        saved_quality(str(loose))
        saved_step(str(loose))

    ledger = folder / "run" / "checkpoints" / "complete.json"
    lines = [b"".join(map(encode, rows)), json.dumps(rows[0]).encode()]
    return [
        Reader("configuration", [config], lambda x: config_lib.from_json(as_text(x))),
        of_file("config", loose / "config" / "metadata", lambda: read_texts(str(loose))),
        of_file("quality", loose / "quality" / "metadata", read_quality),
        of_file("manifest", sealed, verify),
        of_file("ledger", ledger, run.complete_steps),
        of_file("metrics.jsonl", folder / FILE_NAME, metrics, lines),
        of_file("record of a corpus", record, corpus),
    ]


def _model_readers(folder: Path) -> list[Reader]:
    """Readers of models, their settings and states."""
    model, gla = small_model(), small_model("gla")
    path, fla = folder / "state.safetensors", folder / "fla"
    state = generate(model, [[1, 2, 3]], max_new_tokens=2).state
    save_state(str(path), state, model, BYTES)
    named, weights = named_weights(model), folder / "weights.safetensors"
    run = run_json(_config(model.config), BYTES, named)
    bare = {name: json.loads(run)[name] for name in ("config", "tokenizer")}
    fla.mkdir()
    safetensors.numpy.save_file(named_weights(gla), fla / "model.safetensors")

    def read_state() -> None:
        found = load_state(str(path), model, BYTES)
        jax.tree.map(np.testing.assert_array_equal, found, state)

    def read_fla() -> object:
        return load_gla_checkpoint(str(fla))

    files = [safetensors.numpy.save(named), encode_weights(named)]
    runs = [run.encode(), json.dumps(bare).encode()]
    settings = json.dumps(to_fla_config(gla.config)).encode()
    return [
        of_file("state", path, read_state),
        of_file("weights", weights, lambda: read_pytorch_weights(str(weights)), files),
        of_file("exported run", folder / RUN, lambda: read_run(str(folder)), runs),
        of_file("settings of fla", fla / "config.json", read_fla, [settings]),
    ]


def request_readers(folder: Path) -> list[Reader]:
    """All readers of requests and arguments; a state of `run_readers` is in `folder`."""
    model = small_model()
    states = StateFolder(str(folder), model, BYTES, 1 << 24)
    start = states.load("state")
    engine: Any = None  # nothing is executed
    service = Service(engine, BYTES, BYTES.vocab_size, "m", states, _ROLES, lambda: None)

    def reader(name: str, kind: Any, use: Callable[[Any], object], *bodies: object) -> Reader:
        def read(content: bytes) -> None:
            body = requests.parse(kind, content)
            if hasattr(body, "model"):
                service.check_model(body.model)
            use(body)

        return Reader(name, _as_json(*bodies), read)

    def detokenize(body: Any) -> None:
        service.inputs.check_ids("tokens", body.tokens)
        BYTES.decode(body.tokens)

    def upload(content: bytes) -> None:
        named = states.put("uploaded", content)
        states.delete("uploaded")
        service.describe_state(named)

    def known(name: str | None) -> Any:
        return None if name is None else start

    return [
        reader(
            "/v1/completions",
            requests.CompletionRequest,
            lambda body: service.complete(body, known(body.state)),
            _SAMPLING | {"prompt": "aé", "max_tokens": 5, "logprobs": 2, "echo": True},
            {"prompt": [[1, 2], [3]], "state": "s", "stop": "x"},
            {"prompt": ["a", "b"], "temperature": 0},
        ),
        reader(
            "/v1/chat/completions",
            requests.ChatRequest,
            lambda body: service.chat(body, known(body.state)),
            _SAMPLING | {"messages": CHAT, "logprobs": True, "top_logprobs": 3, "max_tokens": 4},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        ),
        reader(
            "/tokenize",
            requests.TokenizeRequest,
            lambda body: service.inputs.encode(body.prompt),
            {"prompt": "aé", "return_token_strs": True},
        ),
        reader("/detokenize", requests.DetokenizeRequest, detokenize, {"tokens": [97, 195, 256]}),
        reader(
            "/v1/states",
            requests.StateRequest,
            lambda body: service.prefill_state(body, known(body.parent)),
            {"prompt": [97, 98], "parent": "p", "name": "n"},
        ),
        reader("/v1/states/p/fork", requests.ForkRequest, lambda body: None, {"name": "n"}),
        Reader("upload of a state", [(folder / "state.safetensors").read_bytes()], upload),
        *_argument_readers(),
    ]


def _argument_readers() -> list[Reader]:
    """Readers of arguments of the library, given as JSON: its values are those of Python."""
    settings: dict[str, Any] = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 7}
    settings |= {"eos_id": 257, "banned_ids": [1, 2]}

    def messages(values: Any) -> None:
        checked = messages_of(values if isinstance(values, dict) else {"messages": values})
        for template in (_ROLES, ChatTemplate(CHATML)):
            template.render(checked, add_generation_prompt=True)
            list(template.pieces([checked], only_assistant=True))

    def sampling(values: Any) -> None:
        given = values if isinstance(values, dict) else {}
        known = {name: given.get(name, value) for name, value in settings.items()}
        arguments.checked_settings(BYTES.vocab_size, **known)
        arguments.checked_length(given.get("max_new_tokens", 5), 2)

    def prompts(values: Any) -> None:
        if isinstance(values, list) and values and isinstance(values[0], str):
            arguments.checked_texts(values, 2)
        else:
            arguments.checked_prompts(values, BYTES.vocab_size, None)

    def reader(name: str, use: Callable[[Any], None], *examples: object) -> Reader:
        def read(content: bytes) -> None:
            try:
                values = json.loads(content)
            except (ValueError, RecursionError):
                values = None
            use(values)

        return Reader(name, _as_json(*examples), read)

    return [
        reader("messages", messages, CHAT, SHAREGPT, ALPACA),
        reader("sampling", sampling, settings | {"max_new_tokens": 5}),
        reader("prompts", prompts, [[1, 2], [3]], [1, 2], ["a", "b"]),
    ]


def small_model(block: str = "residual") -> LanguageModel:
    """Make a small model of bytes."""
    config = ModelConfig(
        vocab_size=BYTES.vocab_size, block=block, num_layers=1, hidden_dim=8, key_dim=8,
        value_dim=8, num_heads=1, mlp_dim=11, tie_embeddings=False,
    )  # fmt: skip
    return LanguageModel(config, rngs=nnx.Rngs(0))


def _config(model: ModelConfig) -> Config:
    return Config(model=model, train=TrainConfig(steps=7))


def _as_json(*values: object) -> list[bytes]:
    return [json.dumps(value).encode() for value in values]
