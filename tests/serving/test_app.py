"""The HTTP application, by calls without a network."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from small_runs import small_model

from simplernn_jax.data.chat_template import TemplateError
from simplernn_jax.data.tokenizer import ByteTokenizer
from simplernn_jax.serving.app import make_app
from simplernn_jax.serving.http import protect
from simplernn_jax.serving.requests import RequestError
from simplernn_jax.serving.service import Service
from simplernn_jax.serving.states import StateFolder
from simplernn_jax.serving.worker import Worker


@pytest.fixture
def service(tmp_path):
    """A service whose worker does not run."""
    model = small_model("parallel")
    worker = Worker(model, num_slots=2, cache_bytes=0, max_waiting=1)
    states = StateFolder(str(tmp_path), model, ByteTokenizer(), 1 << 30)
    return Service(worker, ByteTokenizer(), model.config.vocab_size, "base", states)


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
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    await app(scope, receive, send)
    content = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], json.loads(content) if content[:1] == b"{" else content


def test_long_work_is_done_while_others_are_answered(service, monkeypatch):
    """Renderings wait for one process, and take one thread and the room of their bodies."""
    started, others_ran = threading.Event(), threading.Event()

    def render(messages, add_generation_prompt):
        started.set()
        assert others_ran.wait(60)
        raise TemplateError("it took too long")

    service.template, service.status = mock.Mock(render=render), "ready"
    monkeypatch.setattr("simplernn_jax.serving.http.MAX_BODIES_BYTES", 130_000)
    messages = [{"role": "user", "content": "a" * 40_000}]
    app, body = make_app(service), json.dumps({"messages": messages}).encode()

    async def run():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        asking = [
            asyncio.create_task(answer_of(app, "POST", "/v1/chat/completions", body))
            for _ in range(3)
        ]
        while not started.is_set():
            await asyncio.sleep(0.001)
        assert (await answer_of(app, "GET", "/v1/states"))[0] == 200
        for size, status in ((20_000, 503), (10_000, 200)):
            text = json.dumps({"prompt": "a" * size}).encode()
            assert (await answer_of(app, "POST", "/tokenize", text))[0] == status
        others_ran.set()
        for status, answer in await asyncio.gather(*asking):
            assert (status, answer["error"]["message"]) == (400, "messages: it took too long")

    asyncio.run(run())


def test_a_client_that_leaves_before_its_stream_begins_ends_its_jobs(service):
    service.status = "ready"
    body = {"type": "http.request", "body": b'{"prompt": "a", "stream": true}'}
    receive = mock.AsyncMock(side_effect=[body, {"type": "http.disconnect"}])
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    asyncio.run(make_app(service)(scope, receive, lambda message: asyncio.sleep(60)))
    (job,) = service.worker.scheduler.waiting
    assert job.is_cancelled


def test_errors_repeat_little_of_what_was_sent(service):
    app = make_app(service)
    long = "x" * 1_000_000
    body = json.dumps({"prompt": "a", "model": long}).encode()
    for method, path, content, status in (
        ("POST", "/tokenize", body, 404),
        ("POST", "/tokenize", json.dumps({long: 1}).encode(), 400),
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


def test_other_sites_are_rejected_and_told_which_flag_allows_them(service):
    gate = protect(make_app(service), None, None, only_local=True)
    for headers, flag in (
        ({"host": "evil.example"}, "--api_key_file"),
        ({"host": "localhost:80", "origin": "http://a.example"}, "--allow_origin=http://a.example"),
        ({"host": "localhost", "origin": "null"}, "--allow_origin=null"),
    ):
        status, answer = call(gate, "GET", "/v1/models", **headers)
        assert (status, flag in answer["error"]["message"]) == (403, True)
    own = {"host": "localhost:80", "origin": "http://localhost:80"}
    assert call(gate, "GET", "/v1/models", **own)[0] == 200


def test_a_failed_reload_is_tried_again(service):
    model = small_model("parallel")
    newest = "newer"
    service._load_other = lambda in_use: None if in_use == newest else (newest, model)

    async def reload_thrice():
        failing = mock.patch.object(service.worker, "make_scheduler", side_effect=MemoryError)
        with failing, pytest.raises(MemoryError):
            await service.reload()
        return [await service.reload() for _ in range(2)]

    assert asyncio.run(reload_thrice()) == [True, False]
    nnx.update(model, jax.tree.map(lambda x: x * jnp.nan, nnx.state(model, nnx.Param)))
    newest = "diverged"
    with pytest.raises(RequestError, match="the model's logits are not finite") as raised:
        asyncio.run(service.reload())
    assert raised.value.status == 409
