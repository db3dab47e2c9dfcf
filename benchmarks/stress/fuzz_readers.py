"""Readers of what runs write, of requests and of arguments, for `fuzz`."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax import nnx

from simplernn_jax import load_model
from simplernn_jax.checkpoint import manifest
from simplernn_jax.checkpoint.contents import read_quality, read_texts
from simplernn_jax.checkpoint.folder import CheckpointFolder
from simplernn_jax.config import from_json
from simplernn_jax.data.chat_template import ChatTemplate, load_template, messages_of
from simplernn_jax.data.store_files import META_FILE, CorruptStore, open_store
from simplernn_jax.errors import UserError
from simplernn_jax.export.formats import TrainedModel, find_format
from simplernn_jax.inference import arguments, generate, load_state, save_state
from simplernn_jax.inference.loading import RUN, WEIGHTS, read_run
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.gla_checkpoint import load_gla_checkpoint, to_fla_config
from simplernn_jax.models.named_weights import named_weights
from simplernn_jax.models.pytorch_weights import encode_weights, read_pytorch_weights
from simplernn_jax.serving import requests
from simplernn_jax.serving.service import Service
from simplernn_jax.serving.states import StateFolder
from simplernn_jax.training.loss_curve import highest_loss, loss_curves
from simplernn_jax.training.metrics import FILE_NAME, encode, read_metrics

from .fuzz_data import BYTES, CHAT, CHATML, SHAREGPT, Reader, as_text, of_file
from .runs import run_quietly, small_config

_SAMPLING = {
    "model": "m", "n": 2, "stream": True, "stream_options": {"include_usage": True},
    "stop": ["a", "bc"], "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1,
    "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.5,
    "logit_bias": {"97": 2.5}, "seed": 7, "stop_token_ids": [3], "banned_token_ids": [4],
    "ignore_eos": True, "user": "u",
}  # fmt: skip
_ROLES = ChatTemplate(load_template("roles"))


def run_readers(folder: Path) -> list[Reader]:
    """All readers of what runs write, and of requests; their files are in `folder`."""
    config = small_config(folder, steps=3, save_every=3, eval_every=3)
    run_quietly(config, folder / "run")
    trained = TrainedModel(*load_model(str(folder / "run")), str(folder / "run"))
    return [
        *_checkpoint_readers(folder),
        *_model_readers(folder, trained),
        *_request_readers(folder, trained.model),
        *_argument_readers(),
    ]


def _checkpoint_readers(folder: Path) -> list[Reader]:
    """Readers of the parts of a checkpoint, of metrics, and of a tokenized corpus."""
    run = CheckpointFolder(str(folder / "run"))
    checkpoint = Path(run.step_path(3))
    loose = str(shutil.copytree(checkpoint, folder / "loose"))  # without a manifest that is read
    sealed = checkpoint / manifest.MANIFEST_NAME
    original, config = sealed.read_bytes(), folder / "run" / "config.json"
    (record,) = (folder / "tokens").glob(f"*/{META_FILE}")

    def verify() -> None:
        is_same = sealed.read_bytes() == original
        assert (run.find_corruption(3) is None) == is_same, "a changed manifest is accepted"
        sealed.write_bytes(original)

    def metrics() -> None:
        rows = read_metrics(str(folder / "run"))
        highest_loss(*loss_curves(rows))
        for row in rows:
            encode(row)

    def corpus() -> None:
        try:
            open_store(record.parent)
        except CorruptStore as error:
            raise UserError(str(error)) from error

    return [
        Reader("configuration", [config.read_bytes()], lambda x: from_json(as_text(x))),
        of_file("config", Path(loose, "config", "metadata"), lambda: read_texts(loose)),
        of_file("quality", Path(loose, "quality", "metadata"), lambda: read_quality(loose)),
        of_file("manifest", sealed, verify),
        of_file("metrics.jsonl", folder / "run" / FILE_NAME, metrics),
        of_file("record of a corpus", record, corpus),
    ]


def _model_readers(folder: Path, trained: TrainedModel) -> list[Reader]:
    """Readers of models, their settings and states."""
    model, tokenizer = trained.model, trained.tokenizer
    state = generate(model, [[1, 2, 3]], max_new_tokens=2).state
    path, weights, fla = folder / "state.safetensors", folder / WEIGHTS, folder / "fla"
    save_state(str(path), state, model, tokenizer)
    find_format("safetensors").write(trained, folder)
    files = [weights.read_bytes(), encode_weights(named_weights(model))]
    exported = (folder / RUN).read_bytes()
    bare = {name: json.loads(exported)[name] for name in ("config", "tokenizer")}
    gla = dataclasses.replace(trained.config.model, block="swiglu", mixer="gla")
    fla.mkdir()
    named = named_weights(LanguageModel(gla, rngs=nnx.Rngs(0)))
    safetensors.numpy.save_file(named, fla / "model.safetensors")

    def read_state() -> None:
        found = load_state(str(path), model, tokenizer)
        jax.tree.map(np.testing.assert_array_equal, found, state)

    def read_fla() -> object:
        return load_gla_checkpoint(str(fla))

    return [
        of_file("state", path, read_state),
        of_file("weights", weights, lambda: read_pytorch_weights(str(weights)), files),
        of_file(
            *("exported run", folder / RUN, lambda: read_run(str(folder))),
            [exported, *_as_json(bare)],
        ),
        of_file("settings of fla", fla / "config.json", read_fla, _as_json(to_fla_config(gla))),
    ]


def _request_readers(folder: Path, model: LanguageModel) -> list[Reader]:
    """Readers of requests; a state is in `folder`."""
    states = StateFolder(str(folder), model, BYTES, 1 << 24)
    start = states.load("state").prefix
    worker: Any = None  # nothing is executed
    service = Service(worker, BYTES, BYTES.vocab_size, "m", states, _ROLES)

    def reader(name: str, kind: Any, use: Callable[[Any], object], *bodies: object) -> Reader:
        def read(content: bytes) -> None:
            body = requests.parse(kind, content)
            if hasattr(body, "model"):
                service.check_model(body.model)
            use(body)

        return Reader(name, _as_json(*bodies), read)

    def detokenize(body: Any) -> None:
        service.check_ids("tokens", body.tokens)
        BYTES.decode(body.tokens)

    def upload(content: bytes) -> None:
        named = states.put("uploaded", content)
        states.delete("uploaded")
        states.describe(named)

    def known(name: str | None) -> Any:
        return None if name is None else start

    return [
        reader(
            "/v1/completions",
            requests.CompletionRequest,
            lambda body: service.jobs(body, known(body.state)),
            _SAMPLING | {"prompt": "aé", "max_tokens": 5, "logprobs": 2, "echo": True},
            {"prompt": [[1, 2], [3]], "state": "s", "stop": "x"},
            {"prompt": ["a", "b"], "temperature": 0},
        ),
        reader(
            "/v1/chat/completions",
            requests.ChatRequest,
            lambda body: service.jobs(body, known(body.state)),
            _SAMPLING | {"messages": CHAT, "logprobs": True, "top_logprobs": 3, "max_tokens": 4},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        ),
        reader(
            "/tokenize",
            requests.TokenizeRequest,
            lambda body: service.encode(body.prompt),
            {"prompt": "aé", "return_token_strs": True},
        ),
        reader("/detokenize", requests.DetokenizeRequest, detokenize, {"tokens": [97, 195, 256]}),
        reader(
            "/v1/states",
            requests.StateRequest,
            lambda body: service.jobs(body, known(body.parent)),
            {"prompt": [97, 98], "parent": "p", "name": "n"},
        ),
        Reader("upload of a state", [(folder / "state.safetensors").read_bytes()], upload),
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
        arguments.checked_sampling(BYTES.vocab_size, **known)
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
        reader("messages", messages, CHAT, SHAREGPT),
        reader("sampling", sampling, settings | {"max_new_tokens": 5}),
        reader("prompts", prompts, [[1, 2], [3]], [1, 2], ["a", "b"]),
    ]


def _as_json(*values: object) -> list[bytes]:
    return [json.dumps(value).encode() for value in values]
