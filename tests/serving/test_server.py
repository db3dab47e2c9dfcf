"""scripts/serve.py over HTTP, by OpenAI's client and by requests of our own."""

import asyncio
import concurrent.futures
import json
import re
import signal
import socket
import time
import urllib.parse

import jax
import numpy as np
import pytest
import uvicorn
from flax import nnx
from processes import assert_each_refused, serving
from references import needs_compiler
from small_runs import HYBRID, save_untrained, save_untrained_chat, small_config, untrained_run
from uvicorn.server import ServerState

from simplernn_jax import load_model
from simplernn_jax.data.chat_template import ChatTemplate
from simplernn_jax.export.formats import TrainedModel, find_format
from simplernn_jax.inference import Conversation, generate_text, load_state, save_state
from simplernn_jax.serving.server import DeadlineProtocol, listen

pytestmark = pytest.mark.oldest_python


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save_untrained_chat(tmp_path_factory.mktemp("run"), **HYBRID)


@pytest.fixture(scope="module")
def server(workdir):
    with serving(workdir, "--slots=5", "--max_queue=40") as process:
        yield process


SAMPLED = {"temperature": 0.9, "max_tokens": 40}


def joined(chunks):
    texts = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    return texts


def test_openai_completion_streamed_and_not(client):
    model = client.models.list().data[0].id
    asked = {"model": model, "prompt": ["aé", "b c"], "n": 3, "seed": 7, **SAMPLED}
    whole = client.completions.create(**asked, logprobs=3)
    assert [choice.index for choice in whole.choices] == list(range(6))
    assert {choice.finish_reason for choice in whole.choices} <= {"stop", "length"}
    assert len({choice.text for choice in whole.choices}) == 6
    assert whole.usage.prompt_tokens == 4 + 4
    assert whole.usage.total_tokens == 8 + whole.usage.completion_tokens
    for choice in whole.choices:
        logprobs = choice.logprobs
        assert all(len(top) == 3 for top in logprobs.top_logprobs)
        assert logprobs.text_offset == sorted(logprobs.text_offset)
    chunks = list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    assert joined(chunks) == {choice.index: choice.text for choice in whole.choices}
    reasons = [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert len(reasons) == 6


ASKED = {
    "model": "chat",
    "messages": [
        {"role": "developer", "content": "brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "hä"}, {"type": "text", "text": "?"}],
        },
    ],
    "seed": 3,
    "max_completion_tokens": 2000,
}


def test_openai_chat_completion_streamed_and_not(client):
    whole = client.chat.completions.create(**ASKED, n=3, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in whole.choices}) == 3
    for choice in whole.choices:
        assert choice.message.role == "assistant"
        assert "\x04" not in choice.message.content
        assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
        spelled = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
        # The end of the turn may complete a broken character, and then belongs to the text.
        found = spelled.decode("utf-8", "replace").removesuffix("\x04")
        assert found == choice.message.content
    assert "stop" in {choice.finish_reason for choice in whole.choices}
    chunks = list(
        client.chat.completions.create(
            **ASKED, n=3, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    texts, roles = ["", "", ""], []
    for chunk in chunks[:-1]:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert roles == ["assistant"] * 3
    # An answer can be sent back as it came.
    messages = [*ASKED["messages"], whole.choices[0].message, {"role": "user", "content": "more"}]
    client.chat.completions.create(**ASKED | {"messages": messages})


def test_greedy_answers_of_a_chat_are_those_of_the_library(workdir, server):
    model, tokenizer, config = load_model(str(workdir))
    conversation = Conversation(model, tokenizer, ChatTemplate(config.data.template))
    messages = []
    for question in ("a", "bc"):
        messages.append({"role": "user", "content": question})
        answer = conversation.ask(question, max_new_tokens=20)
        body = {"messages": messages, "max_tokens": 20, "temperature": 0}
        _, _, found = server.send("POST", "/v1/chat/completions", body)
        assert found["choices"][0]["message"]["content"] == answer
        messages.append({"role": "assistant", "content": answer})


def test_a_conversation_continues_a_state(server):
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    asked = {"role": "user", "content": "c"}
    fields = {"max_tokens": 20, "seed": 1, "logprobs": True}
    text = server.send("GET", "/tokenizer_info")[2]["chat_template"]
    prompt = ChatTemplate(text).render(said)
    _, _, state = server.send("POST", "/v1/states", {"prompt": prompt, "name": "s"})
    assert state["tokens"] == 1 + len(prompt)
    bodies = [{"messages": [*said, asked]}, {"messages": [asked], "state": "s"}]
    answers = [server.send("POST", "/v1/chat/completions", body | fields)[2] for body in bodies]
    contents = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert contents[0] == contents[1]
    server.send("DELETE", "/v1/states/s")


def test_echo_and_log_probabilities(server):
    fields = {"prompt": [256, 97, 98, 99], "echo": True, "logprobs": 0, "n": 3, "ignore_eos": True}
    for choice in server.complete(max_tokens=2, **fields)["choices"]:
        assert choice["text"].startswith("abc")
        assert choice["logprobs"]["top_logprobs"] == [None, *[{}] * 5]
        assert choice["logprobs"]["token_logprobs"][0] is None
    frames = stream(server, max_tokens=0, **fields)
    for frame in frames:
        (choice,) = frame["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
        assert len(choice["logprobs"]["tokens"]) == 4
    assert len(frames) == 3


def test_a_repetition_penalty_counts_the_text_of_a_state(server):
    fields = {"max_tokens": 20, "temperature": 0, "repetition_penalty": 3, "ignore_eos": True}
    text = "abé \nabé \n"
    assert server.send("POST", "/v1/states", {"prompt": text, "name": "said"})[0] == 201
    whole = server.complete(text, **fields)["choices"][0]["text"]
    assert server.complete("", state="said", **fields)["choices"][0]["text"] == whole
    server.send("DELETE", "/v1/states/said")


def test_stop_strings_cut_the_text_across_tokens_and_blocks(server):
    fields = {"prompt": "b", "max_tokens": 120, "seed": 5, "ignore_eos": True}
    text = server.complete(**fields)["choices"][0]["text"]
    for start in (0, 7, 31, 50):
        stop = text[start : start + 3]
        expected = text[: text.index(stop)], "stop"
        choice = server.complete(stop=[stop, "never"], **fields)["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == expected
        choices = [c for f in stream(server, stop=stop, **fields) for c in f["choices"]]
        assert ("".join(c["text"] for c in choices), choices[-1]["finish_reason"]) == expected


def stream(server, **fields):
    status, headers, body = server.send("POST", "/v1/completions", {**fields, "stream": True})
    assert status == 200
    assert headers["Content-Type"].startswith("text/event-stream")
    *frames, done, end = body.decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def test_states_are_saved_downloaded_uploaded_and_deleted(workdir, server, tmp_path):
    def send(method, path, body=None, status=200):
        found, _, content = server.send(method, "/v1/states" + path, body)
        assert found == status, content
        return content

    made = send("POST", "", {"prompt": "abc", "name": "trunk"}, 201)
    assert (made["id"], made["tokens"], made["parent"]) == ("trunk", 4, None)
    child = send("POST", "", {"prompt": " de", "parent": "trunk", "name": "branch"}, 201)
    assert (child["tokens"], child["parent"], child["text"]) == (7, "trunk", "abc de")
    assert send("POST", "", {"parent": "trunk", "name": "copy"}, 201)["tokens"] == 4
    send("POST", "", {"prompt": "", "name": "trunk"}, 409)
    content = send("GET", "/branch/file")
    assert send("PUT", "/again/file", content, 201)["sha256"] == child["sha256"]
    damaged = content[:-1] + bytes([content[-1] ^ 1])
    assert "corrupted" in send("PUT", "/damaged/file", damaged, 400)["error"]["message"]
    settings = {"max_tokens": 20, "seed": 3, "temperature": 1.0, "logprobs": 1}
    choices = [
        server.complete("b", state=name, **settings)["choices"][0]
        for name in ("branch", "again", "trunk", "copy")
    ]
    assert choices[0] == choices[1]
    assert choices[2] == choices[3] != choices[0]
    # The library reads the file of the server, and the server that of the library.
    model, tokenizer, _ = load_model(str(workdir))
    (tmp_path / "branch").write_bytes(content)
    state = load_state(tmp_path / "branch", model, tokenizer)
    text = generate_text(model, tokenizer, "b", state=state, max_new_tokens=20)
    greedy = server.complete("b", state="branch", max_tokens=20, temperature=0)
    assert greedy["choices"][0]["text"] == text[0]
    save_state(tmp_path / "saved", text.state, model, tokenizer)
    send("PUT", "/saved/file", (tmp_path / "saved").read_bytes(), 201)
    names = [state["id"] for state in send("GET", "")["data"]]
    assert names == ["again", "branch", "copy", "saved", "trunk"]
    for name in names:
        assert send("DELETE", "/" + name)["deleted"]
    send("GET", "/trunk", status=404)
    send("POST", "", {"prompt": "a", "name": ".."}, 400)
    send("GET", "/" + urllib.parse.quote("../trunk", safe=""), status=404)


def test_requests_that_cannot_be_answered(server):
    status, _, body = server.send("POST", "/v1/completions", {"prompt": "a", "temperature": 3})
    assert (status, body["error"]["type"]) == (400, "invalid_request_error")
    assert (body["error"]["param"], "<= 2.0" in body["error"]["message"]) == ("temperature", True)
    assert server.send("POST", "/v1/completions", b"{")[0] == 400
    assert server.send("GET", "/v1/nothing")[0] == 404
    assert server.send("GET", "/v1/completions")[0] == 405
    assert server.send("POST", "/v1/completions", {"model": "gpt-4"})[0] == 404
    assert server.send("POST", "/v1/completions", b" " * (1 << 24) + b"1")[0] == 413


def test_tokenize_and_detokenize(server):
    _, _, body = server.send("POST", "/tokenize", {"prompt": "aé", "return_token_strs": True})
    assert body["tokens"] == [256, 97, 0xC3, 0xA9]
    assert body["token_strs"][1:] == ["a", r"bytes:\xc3", r"bytes:\xa9"]
    _, _, body = server.send("POST", "/detokenize", {"tokens": body["tokens"]})
    assert body == {"prompt": "aé"}
    assert server.send("GET", "/tokenizer_info")[2]["eos_token_id"] == 257


def wait_until_idle(server):
    while True:
        found = server.send("GET", "/slots")[2]
        if found["active"] == found["waiting"] == 0:
            return
        time.sleep(0.01)


def test_a_client_that_does_not_read_pauses_its_request_and_loses_nothing(server):
    fields = {"max_tokens": 3000, "ignore_eos": True, "seed": 1, "logprobs": 5}

    def num_tokens():
        text = server.send("GET", "/metrics")[2].decode()
        return float(re.search("^simplernn_new_tokens (.*)$", text, re.MULTILINE)[1])

    start = num_tokens()
    with server.post(prompt="a", stream=True, **fields) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        while (before := num_tokens()) == start:
            time.sleep(0.01)
        time.sleep(0.5)
        while before != (before := num_tokens()):
            time.sleep(0.5)
        assert before < start + 3000
        assert server.send("GET", "/slots")[2]["active"] == 1
        expected = server.complete("a", **fields)["choices"][0]  # in another slot
        connection.settimeout(60)
        content = b""
        while not content.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            content += connection.recv(1 << 20)
    frames = re.findall(rb"^data: (\{.*\})$", content, re.MULTILINE)
    choices = [json.loads(frame)["choices"][0] for frame in frames]
    assert "".join(choice["text"] for choice in choices) == expected["text"]
    values = [value for choice in choices for value in choice["logprobs"]["token_logprobs"]]
    assert values == expected["logprobs"]["token_logprobs"]


def test_clients_that_leave_free_their_slots_and_end_their_prefills(server):
    for is_streamed in (False, True):
        fields = {"prompt": "a", "max_tokens": 10**6, "ignore_eos": True, "stream": is_streamed}
        sockets = [server.post(**fields) for _ in range(12)]
        while server.send("GET", "/slots")[2]["active"] < 5:
            time.sleep(0.01)
        for connection in sockets:
            connection.close()
        wait_until_idle(server)
    with server.post("/v1/states", prompt="ab" * 4_000_000, name="left"):
        while server.send("GET", "/slots")[2]["waiting"] == 0:
            time.sleep(0.01)
    wait_until_idle(server)
    assert server.send("GET", "/v1/states/left")[0] == 404


def test_metrics_and_page(server):
    usages = [server.complete("abc " * 20, max_tokens=20)["usage"] for _ in range(2)]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached == [0, 64]
    text = server.send("GET", "/metrics")[2].decode()
    values = dict(line.split(" ") for line in text.splitlines() if not line.startswith("#"))
    assert float(values["simplernn_slots"]) == 5
    assert float(values["simplernn_time_to_first_token_seconds_count"]) > 0
    assert server.send("GET", "/")[2].startswith(b"<!doctype html>")


def test_key_drain_and_reload(tmp_path):
    workdir = untrained_run(tmp_path, **HYBRID)
    (tmp_path / "key").write_text("secret\n")
    states = tmp_path / "states"
    states.mkdir()
    model, tokenizer, _ = load_model(str(workdir))
    state = generate_text(model, tokenizer, "ab", max_new_tokens=0).state
    save_state(states / "s.safetensors", state, model, tokenizer)
    flags = [f"--api_key_file={tmp_path / 'key'}", f"--state_dir={states}", "--slots=2"]
    flags += ["--allow_origin=http://a.example", "--max_connections=2"]
    key = {"Authorization": "Bearer secret"}
    with serving(workdir, *flags) as server:
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "secret"}):
            assert server.send("GET", "/v1/models", **headers)[0] == 401
        assert server.send("GET", "/v1/models", **key)[0] == 200
        assert server.send("GET", "/health")[0] == 200
        # As browsers ask before a page of another site sends a key to a server on this machine.
        asked = {"Access-Control-Request-Method": "POST"}
        asked["Access-Control-Request-Private-Network"] = "true"
        for origin, allowed in (
            ("http://a.example", "http://a.example"),
            ("http://b.example", None),
        ):
            _, headers, _ = server.send("OPTIONS", "/v1/states", Origin=origin, **asked)
            assert headers["Access-Control-Allow-Origin"] == allowed
        body = {"prompt": "b", "state": "s", "max_tokens": 3}
        assert server.send("POST", "/v1/completions", body, **key)[0] == 200
        assert server.send("POST", "/v1/states", {"prompt": "ab", "name": "t"}, **key)[0] == 201
        assert (states / "t.safetensors").is_file()
        address = server.url.removeprefix("http://").split(":")
        with socket.create_connection(address), socket.create_connection(address):
            assert server.send("GET", "/health")[0] == 503
        while server.send("GET", "/health")[0] == 503:  # until the server sees that both are closed
            time.sleep(0.01)
        config = small_config(**HYBRID, source=str(tmp_path / "texts"))
        save_untrained(config, workdir, step=2, model_seed=5)
        for is_newer in (True, False):
            found = server.send("POST", "/admin/reload", **key)[2]
            assert found == {"reloaded": is_newer}
        assert server.send("GET", "/v1/states", **key)[2]["data"] == []  # of older parameters
        body = {"prompt": "a", "max_tokens": 3000, "seed": 1, "ignore_eos": True}
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(server.send, "POST", "/v1/completions", body, **key)
            while server.send("GET", "/slots", **key)[2]["active"] == 0:
                time.sleep(0.01)
            code, errors = server.stop(signal.SIGTERM)
            status, _, answer = running.result()
        assert (code, status, answer["usage"]["completion_tokens"]) == (0, 200, 3000), errors


@needs_compiler
def test_an_answer_is_not_prefilled_again_even_after_a_restart(tmp_path):
    workdir, flags = untrained_run(tmp_path, block="parallel"), [f"--state_dir={tmp_path}/states"]
    settings = {"temperature": 0, "max_tokens": 90, "ignore_eos": True}
    settings["banned_token_ids"] = [*range(97), *range(123, 256)]

    def replayed(prompt):
        usage = server.complete(prompt, **settings)["usage"]
        found = usage["prompt_tokens_details"]
        assert found["cached_tokens"] + found["replayed_tokens"] == usage["prompt_tokens"]
        return found["replayed_tokens"]

    with serving(workdir, *flags) as server:
        assert replayed("ab" * 15) == 31
        text = "ab" * 15 + server.complete("ab" * 15, **settings)["choices"][0]["text"]
        assert replayed(text + "c") == 1
        assert server.stop()[0] == 0
    with serving(workdir, *flags) as server:
        assert replayed(text + "cd") == 1
        assert 1 < replayed(text[:100] + "X") <= 65


def test_an_export_is_served_until_its_streams_have_had_their_time(workdir, tmp_path):
    model, tokenizer, config = load_model(str(workdir))
    find_format("safetensors").write(TrainedModel(model, tokenizer, config, "run"), tmp_path)
    with serving(tmp_path, "--slots=2", "--drain_timeout=0.5") as server:
        text = server.complete("ab", max_tokens=9, temperature=0)["choices"][0]["text"]
        assert server.send("POST", "/admin/reload")[2] == {"reloaded": False}
        body = {"prompt": "a", "max_tokens": 10**6, "ignore_eos": True, "stream": True}
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(server.send, "POST", "/v1/completions", body)
            while server.send("GET", "/slots")[2]["active"] == 0:
                time.sleep(0.01)
            code, errors = server.stop(signal.SIGINT)
            status, _, content = running.result()
    assert text == generate_text(model, tokenizer, "ab", max_new_tokens=9)[0]
    assert (code, status, "Traceback" in errors) == (0, 200, False), errors
    *tokens, last, end = content.decode().split("\n\n")
    assert tokens
    assert end == ""
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server is stopping"


@pytest.mark.filterwarnings("ignore")  # of lm-eval and its libraries
def test_log_likelihoods_of_lm_eval_are_those_of_the_model(workdir, server):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    pairs = [("ab cé" * (1 + 5 * n), [" d", "é", "a b", "dd"][n % 4] * (1 + n)) for n in range(13)]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    found = []
    for batch_size in (1, 8):
        client = LocalCompletionsAPI(
            base_url=server.url + "/v1/completions",
            model="chat",
            batch_size=batch_size,
            num_concurrent=8,
            max_retries=1,
        )
        found.append(client.loglikelihood(requests, disable_tqdm=True))
    assert found[0] == found[1]
    model, tokenizer, _ = load_model(str(workdir))
    encoded = [tokenizer.encode(context + rest) for context, rest in pairs]
    padded = np.zeros((len(pairs), max(map(len, encoded))), np.int32)
    for row, ids in zip(padded, encoded, strict=True):
        row[: len(ids)] = ids
    score_all = nnx.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)[0]))
    logprobs = np.asarray(score_all(model, padded))
    for (context, _), (score, is_greedy), ids, of_text in zip(
        pairs, found[0], encoded, logprobs, strict=True
    ):
        start = len(tokenizer.encode(context))
        predictions, targets = of_text[start - 1 : len(ids) - 1], ids[start:]
        wanted = predictions[np.arange(len(targets)), targets].sum()
        assert score == pytest.approx(float(wanted), abs=1e-4)
        assert is_greedy == bool((predictions.argmax(axis=-1) == targets).all())


def test_a_connection_ends_whose_request_does_not_arrive(monkeypatch):
    monkeypatch.setattr("simplernn_jax.serving.server.HEADER_SECONDS", 0.05)
    config = uvicorn.Config(lambda scope, receive, send: None)
    config.load()

    async def connect(listener):
        await asyncio.get_running_loop().create_server(
            lambda: DeadlineProtocol(config, ServerState(), {}), sock=listener
        )
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(b"GET / HTTP/1.1\r\n")
        assert await reader.read() == b""
        writer.close()

    with listen("127.0.0.1", 0) as listener:
        asyncio.run(asyncio.wait_for(connect(listener), 60))


def test_flags_that_cannot_be_served(workdir, tmp_path):
    run = f"--workdir={workdir}"
    (tmp_path / "key").write_bytes(b"a b")
    assert_each_refused(
        "scripts/serve.py",
        ([], "no --workdir"),
        ([f"--workdir={tmp_path}"], "no checkpoint"),
        ([run, "--host=0.0.0.0"], "--api_key_file"),
        ([run, "--host=192.0.2.1", "--allow_remote_without_key"], "listen"),
        *(([run, f"--drain_timeout={x}"], "[0, 86400]") for x in ("nan", "inf", "-1")),
        ([run, "--allow_origin=évil"], "--allow_origin"),
        ([run, f"--api_key_file={tmp_path / 'key'}"], "no spaces"),
    )
