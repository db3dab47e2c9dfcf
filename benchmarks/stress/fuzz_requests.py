"""Readers of requests and arguments: bodies of the HTTP API, messages, prompts and settings."""

import json
from pathlib import Path
from typing import Any

from simplernn_jax.data.chat_template import ChatTemplate, load_template, messages_of
from simplernn_jax.inference.arguments import (
    checked_length,
    checked_prompts,
    checked_sampling,
    checked_texts,
)
from simplernn_jax.serving.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ForkRequest,
    StateRequest,
    TokenizeRequest,
    parse,
)
from simplernn_jax.serving.service import Service
from simplernn_jax.serving.states import StateFolder

from .fuzz import Reader
from .fuzz_data import ALPACA, BYTES, CHAT, CHATML, SHAREGPT, void
from .fuzz_runs import small_model

_SAMPLING = {
    "model": "m", "n": 2, "stream": True, "stream_options": {"include_usage": True},
    "stop": ["a", "bc"], "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1,
    "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.5,
    "logit_bias": {"97": 2.5}, "seed": 7, "stop_token_ids": [3], "banned_token_ids": [4],
    "ignore_eos": True, "user": "u",
}  # fmt: skip


def request_readers(folder: Path) -> list[Reader]:
    """All readers of requests and arguments."""
    model = small_model()
    states = StateFolder(str(folder), model, BYTES, 1 << 24)
    start = states.load("state").prefix  # saved by `fuzz_runs`
    worker: Any = None  # nothing is executed
    template = ChatTemplate(load_template("roles"))
    service = Service(worker, BYTES, BYTES.vocab_size, "m", states, template, lambda: None)

    def complete(content: bytes) -> None:
        body = parse(CompletionRequest, content)
        service.check_model(body.model)
        service.complete(body, None if body.state is None else start)

    def chat(content: bytes) -> None:
        body = parse(ChatRequest, content)
        service.check_model(body.model)
        service.chat(body, None if body.state is None else start)

    def tokenize(content: bytes) -> None:
        body = parse(TokenizeRequest, content)
        service.check_model(body.model)
        service.inputs.encode(body.prompt)

    def detokenize(content: bytes) -> None:
        body = parse(DetokenizeRequest, content)
        service.inputs.check_ids("tokens", body.tokens)
        BYTES.decode(body.tokens)

    def state(content: bytes) -> None:
        body = parse(StateRequest, content)
        service.prefill_state(body, None if body.parent is None else start)

    def upload(content: bytes) -> None:
        named = states.put("uploaded", content)
        states.delete("uploaded")
        service.describe_state(named)

    completions = [
        _SAMPLING | {"prompt": "aé", "max_tokens": 5, "logprobs": 2, "echo": True},
        {"prompt": [[1, 2], [3]], "state": "s", "stop": "x"},
        {"prompt": ["a", "b"], "temperature": 0},
    ]
    chats = [
        _SAMPLING | {"messages": CHAT, "logprobs": True, "top_logprobs": 3, "max_tokens": 4},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "state": "s"},
    ]
    upload_of = [(folder / "state.safetensors").read_bytes()]
    return [
        Reader("/v1/completions", _bodies(*completions), complete),
        Reader("/v1/chat/completions", _bodies(*chats), chat),
        Reader("/tokenize", _bodies({"prompt": "aé", "return_token_strs": True}), tokenize),
        Reader("/detokenize", _bodies({"tokens": [97, 195, 256]}), detokenize),
        Reader("/v1/states", _bodies({"prompt": [97, 98], "parent": "p", "name": "n"}), state),
        Reader("/v1/states/p/fork", _bodies({"name": "n"}), lambda x: void(parse(ForkRequest, x))),
        Reader("upload of a state", upload_of, upload),
        *_argument_readers(),
    ]


def _argument_readers() -> list[Reader]:
    """Readers of arguments of the library, given as JSON: its values are those of Python."""
    templates = [ChatTemplate(load_template("roles")), ChatTemplate(CHATML)]

    def messages(content: bytes) -> None:
        values = _values(content, None)
        checked = messages_of(values if isinstance(values, dict) else {"messages": values})
        for template in templates:
            template.render(checked, add_generation_prompt=True)
            list(template.pieces([checked], only_assistant=True))

    settings: dict[str, Any] = {
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "seed": 7,
        "eos_id": 257,
    }
    settings["banned_ids"] = [1, 2]

    def sampling(content: bytes) -> None:
        values = _values(content, {})
        given = values if isinstance(values, dict) else {}
        known = {name: given.get(name, value) for name, value in settings.items()}
        checked_sampling(BYTES.vocab_size, **known)
        checked_length(given.get("max_new_tokens", 5), 2)

    def prompts(content: bytes) -> None:
        values = _values(content, None)
        if isinstance(values, list) and values and isinstance(values[0], str):
            checked_texts(values, 2)
        else:
            checked_prompts(values, BYTES.vocab_size, None)

    return [
        Reader("messages", _bodies(CHAT, SHAREGPT, ALPACA), messages),
        Reader("sampling", _bodies(settings | {"max_new_tokens": 5}), sampling),
        Reader("prompts", _bodies([[1, 2], [3]], [1, 2], ["a", "b"]), prompts),
    ]


def _bodies(*values: Any) -> list[bytes]:
    return [json.dumps(value).encode() for value in values]


def _values(content: bytes, default: Any) -> Any:
    """Decode JSON; an input that is none is the default."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return default
