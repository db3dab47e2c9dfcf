"""Requests before they reach the worker: bodies, their limits and errors, by calls of the app."""

import asyncio
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import msgspec
import pytest
from small_runs import small_model
from starlette.requests import Request

from simplernn_jax.data.chat_template import TemplateError
from simplernn_jax.data.tokenizer import ByteTokenizer
from simplernn_jax.serving import app as app_module
from simplernn_jax.serving.app import make_app
from simplernn_jax.serving.http import (
    MAX_BODIES_BYTES,
    SMALL_BODY_BYTES,
    Gate,
    read_body,
    read_json,
)
from simplernn_jax.serving.requests import (
    MAX_PROMPTS,
    ChatRequest,
    CompletionRequest,
    RequestError,
    parse,
    parse_prompts,
)
from simplernn_jax.serving.service import Service
from simplernn_jax.serving.states import StateFolder
from simplernn_jax.serving.worker import Worker


@pytest.fixture(scope="module")
def model():
    return small_model("residual")


@pytest.fixture
def service(model, tmp_path):
    """A service whose worker does not run."""
    worker = Worker(model, num_slots=2, cache_bytes=0, max_waiting=1)
    states = StateFolder(str(tmp_path), model, ByteTokenizer(), 1 << 30)
    return Service(
        worker, ByteTokenizer(), model.config.vocab_size, "base", states, None, mock.Mock()
    )


def call(*request, **headers):
    """Return the status and the body of the response to a request, as `answer_of` does."""
    return asyncio.run(answer_of(*request, **headers))


async def answer_of(app, method, path, body=b"", **headers):
    sent = []

    async def receive():
        return {"type": "http.request", "body": body}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    await app(scope, receive, send)
    content = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], json.loads(content) if content[:1] == b"{" else content


def test_the_page_is_not_read_again_from_another_installation(service, tmp_path, monkeypatch):
    content = (app_module.PAGE / "index.html").read_bytes()
    monkeypatch.setattr(app_module, "PAGE", tmp_path)
    app = make_app(service)
    assert call(app, "GET", "/") == (200, content)
    assert call(app, "GET", "/page.js")[0] == 200


ERRORS = {
    "temperature: expected number <= 2.0": {"temperature": 3},
    "max_tokens: expected integer or null, got string": {"max_tokens": "3"},
    "tempera: unknown field": {"tempera": 1},
    "logit_bias: expected integer, got string": {"logit_bias": {"x": 1}},
    "tools: only [] is supported": {"tools": [{"type": "function"}]},
    "functions: only [] is supported": {"functions": [{"name": "f" * 1000}]},
    'tool_choice: only "none" or "auto" is supported': {"tool_choice": "no ne"},
    'response_format: only {"type":"text"} is supported': {
        "response_format": {"type": "json_object"}
    },
}
CHAT_ERRORS = {
    "messages: required field": {},
    "messages[0].role: invalid value 'int'": {"messages": [{"role": "int", "content": ""}]},
    "the body: expected object, got list": [],
}


@pytest.mark.parametrize(
    ("kind", "message", "body"),
    [
        *((CompletionRequest, *item) for item in ERRORS.items()),
        *((ChatRequest, *item) for item in CHAT_ERRORS.items()),
    ],
)
def test_errors_name_the_field_in_plain_words(kind, message, body):
    with pytest.raises(RequestError) as found:
        parse(kind, json.dumps(body).encode())
    assert found.value.message == message
    field = re.match(r"\w+(?=[:[])", message)
    assert found.value.param == (field and field[0])


NEUTRAL = {
    "function_call": "none",
    "functions": [],
    "logit_bias": {},
    "metadata": {"a": "b"},
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "service_tier": "auto",
    "stop": "",
    "store": False,
    "tool_choice": "none",
    "tools": [],
    "user": "me",
}


def test_neutral_values_of_other_fields_change_nothing(service):
    plain = CompletionRequest(prompt=msgspec.Raw(b'"ab"'), seed=1)
    body = {"prompt": "ab", "seed": 1, "best_of": 1, "suffix": "", **NEUTRAL}
    neutral = parse(CompletionRequest, json.dumps(body).encode())
    jobs = [service.complete(request, None).results[0].job for request in (plain, neutral)]
    assert jobs[0].tokens.tolist() == jobs[1].tokens.tolist() == [256, 97, 98]
    assert jobs[0].sampling == jobs[1].sampling
    parse(CompletionRequest, json.dumps(dict.fromkeys(NEUTRAL)).encode())
    parse(
        ChatRequest, json.dumps({"messages": [{"role": "user", "content": ""}], **NEUTRAL}).encode()
    )


def test_neutral_values_are_compared_without_the_spaces_between_tokens():
    parse(CompletionRequest, b'{"response_format": {\r\n"type":\t"text"\n}, "tools": [ ]}')


def test_prompts_of_every_form():
    def parsed(prompt):
        request = parse(CompletionRequest, json.dumps({"prompt": prompt}).encode())
        return parse_prompts(request.prompt)

    assert parsed(None) == parsed("") == [""]
    assert parsed('["a"]') == ['["a"]']
    assert parsed([1, 2]) == [[1, 2]]
    assert parsed([]) == [[]]
    assert parsed(["a", "b"]) == ["a", "b"]
    assert parsed([[1], [2, 3]]) == [[1], [2, 3]]
    assert len(parsed([[1]] * MAX_PROMPTS)) == MAX_PROMPTS
    # The last prompt is one that could not be parsed: its list is rejected before.
    for first in ("a", [1]):
        with pytest.raises(RequestError, match="prompt: expected list of at most length 256"):
            parsed([first] * MAX_PROMPTS + [1.5])


def test_a_full_queue_is_told_in_numbers(service):
    service.status = "ready"
    for _ in range(3):  # two slots are free, and one more may wait
        service.check_room()
        service.worker.submit(mock.Mock())
    with pytest.raises(RequestError, match="3 prompts wait already;") as error:
        service.check_room()
    assert error.value.status == 429
    service.worker.num_waiting = 1
    with pytest.raises(RequestError, match="1 prompt waits already;"):
        service.submit([mock.Mock()])


def test_a_request_may_have_as_many_prompts_as_an_idle_server_takes(service):
    service.status = "ready"
    with pytest.raises(RequestError, match="prompt: 4 prompts; the limit is 3") as error:
        service.submit([mock.Mock() for _ in range(4)])
    assert error.value.status == 400  # however often it is sent
    service.submit([mock.Mock() for _ in range(3)])
    assert service.worker.room == 0


def request_of(app, *parts, until=None):
    """A request whose body arrives in parts, the last one once `until` is set."""
    left = list(parts)

    async def receive():
        if len(left) == 1 and until is not None:
            await until.wait()
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    return Request({"type": "http", "app": app, "method": "POST", "headers": []}, receive)


def test_bodies_have_a_joint_limit():
    large = bytes(15_000_000)
    assert 4 * len(large) < MAX_BODIES_BYTES < 5 * len(large)

    async def run():
        app, until = SimpleNamespace(state=SimpleNamespace(body_bytes=0)), asyncio.Event()

        async def body_of(*parts, until=None):
            async with read_body(request_of(app, *parts, until=until)) as content:
                return content

        reading = [asyncio.create_task(body_of(large, b"end", until=until)) for _ in range(4)]
        while app.state.body_bytes < 4 * len(large):
            await asyncio.sleep(0)
        with pytest.raises(RequestError, match="try again") as error:
            await body_of(large)
        assert error.value.status == 503
        small = bytes(SMALL_BODY_BYTES)
        assert await body_of(small) == small
        until.set()
        assert await asyncio.gather(*reading) == [large + b"end"] * 4
        assert app.state.body_bytes == 0
        assert await body_of(large) == large

    asyncio.run(run())


def test_bodies_count_until_threads_have_handled_them(service):
    encoding, until = threading.Event(), threading.Event()

    def encode(text):
        encoding.set()
        assert until.wait(60)
        return ByteTokenizer().encode(text[:1])

    service.inputs.encode = encode
    app, body = make_app(service), msgspec.json.encode({"prompt": "a" * 100_000})

    async def run():
        asking = asyncio.create_task(answer_of(app, "POST", "/tokenize", body))
        while not encoding.is_set():
            await asyncio.sleep(0.001)
        assert app.state.body_bytes == len(body)
        until.set()
        assert await asking == (200, {"count": 2, "tokens": [256, 97], "token_strs": None})
        assert app.state.body_bytes == 0

    asyncio.run(run())


def test_a_long_body_is_parsed_while_others_are_answered():
    started, others_ran = threading.Event(), threading.Event()

    class Slow(msgspec.Struct):
        prompt: str

        def __post_init__(self):
            started.set()
            assert others_ran.wait(60)

    async def run():
        app = SimpleNamespace(state=SimpleNamespace(body_bytes=0))
        content = msgspec.json.encode({"prompt": "a" * 100_000})

        async def read():
            async with read_json(request_of(app, content), Slow) as (body, size):
                return body.prompt, size

        reading = asyncio.create_task(read())
        while not started.is_set():
            await asyncio.sleep(0.001)
        assert app.state.body_bytes == len(content)
        others_ran.set()
        assert await reading == ("a" * 100_000, len(content))
        assert app.state.body_bytes == 0

    asyncio.run(run())


def test_templates_are_rendered_while_others_are_answered(service):
    """They wait for one process, and take one thread of those that others need."""
    started, others_ran = threading.Event(), threading.Event()

    def render(messages, add_generation_prompt):
        started.set()
        assert others_ran.wait(60)
        raise TemplateError("it took too long")

    service.template, service.status = mock.Mock(render=render), "ready"
    app, body = make_app(service), b'{"messages": [{"role": "user", "content": "a"}]}'

    async def run():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        asking = [
            asyncio.create_task(answer_of(app, "POST", "/v1/chat/completions", body))
            for _ in range(3)
        ]
        while not started.is_set():
            await asyncio.sleep(0.001)
        assert (await answer_of(app, "GET", "/v1/states"))[0] == 200
        others_ran.set()
        for status, answer in await asyncio.gather(*asking):
            assert (status, answer["error"]["message"]) == (400, "messages: it took too long")

    asyncio.run(run())


def test_errors_repeat_little_of_what_was_sent(service):
    app = make_app(service)
    long = "x" * 1_000_000
    body = json.dumps({"prompt": "a", "model": long}).encode()
    for method, path, content, status in (
        ("POST", "/tokenize", body, 404),
        ("POST", "/tokenize", json.dumps({long: 1}).encode(), 400),
        ("GET", f"/v1/models/{long}", b"", 404),
        ("GET", f"/v1/states/{long}", b"", 400),
        ("GET", f"/{long}", b"", 404),
    ):
        found, answer = call(app, method, path, content)
        assert found == status
        assert len(json.dumps(answer)) < 3000
    message = call(app, "POST", "/tokenize", body)[1]["error"]["message"]
    assert message.startswith("model: 'xxx")
    assert message.endswith("is not served here; 'base' is")


def test_a_failure_is_logged_in_one_short_line(service, caplog):
    service.states = mock.Mock(load=mock.Mock(side_effect=ZeroDivisionError))
    assert call(make_app(service), "GET", "/v1/states/a\n" + "b" * 10_000)[0] == 500
    (message,) = caplog.messages
    assert message.startswith(r"GET '/v1/states/a\nbb")
    assert len(message) < 1000


def test_rejected_sites_are_told_which_flag_allows_them():
    gate = Gate(mock.Mock(), None, None, frozenset({"localhost"}))
    status, answer = call(gate, "GET", "/v1/models", host="evil.example")
    assert (status, "--api_key_file" in answer["error"]["message"]) == (403, True)
    status, answer = call(gate, "GET", "/", host="localhost:80", origin="http://a.example")
    assert (status, answer["error"]["message"]) == (
        403,
        "a page of 'http://a.example' is not allowed; start the server with "
        "--allow_origin=http://a.example",
    )
