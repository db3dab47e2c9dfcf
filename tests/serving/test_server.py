"""scripts/serve.py over HTTP, by OpenAI's client and by requests of our own."""

import concurrent.futures
import json
import re
import signal
import socket
import time
import urllib.parse

import pytest
from processes import assert_each_refused
from serving_process import serving
from small_runs import HYBRID, untrained_run

from simplernn_jax import load_model
from simplernn_jax.inference import generate_text, load_state, save_state
from simplernn_jax.serving.server import listen

pytestmark = pytest.mark.oldest_python


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return untrained_run(tmp_path_factory.mktemp("run"), **HYBRID, validation_fraction=0.3)


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


def test_scores_of_a_prompt(server):
    tokens = [256, 97, 98, 97, 99]
    body = server.complete(tokens, echo=True, logprobs=1, max_tokens=1, temperature=0)
    logprobs = body["choices"][0]["logprobs"]
    assert body["choices"][0]["text"].startswith("abac")
    assert len(logprobs["tokens"]) == 6
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    # Greedy means exact equality with the largest one.
    generated = logprobs["token_logprobs"][-1]
    assert generated <= max(logprobs["top_logprobs"][-1].values())
    only = server.complete(tokens, echo=True, logprobs=1, max_tokens=0)["choices"][0]
    assert only["logprobs"]["token_logprobs"] == logprobs["token_logprobs"][:-1]
    assert (only["finish_reason"], only["text"]) == ("length", "abac")


def test_a_prompt_that_is_given_several_times_gets_several_samples(server):
    prompts = ["ab", "b", "ab"]
    body = server.complete(prompts, n=2, seed=7, **SAMPLED)
    texts = [choice["text"] for choice in body["choices"]]
    assert len({*texts}) == 6
    assert texts[:2] + texts[4:] == [
        choice["text"] for choice in server.complete("ab", n=4, seed=7, **SAMPLED)["choices"]
    ]


def test_echo_without_alternatives_and_for_several_choices(server):
    fields = {"prompt": "abc", "echo": True, "logprobs": 0, "n": 3}
    for choice in server.complete(max_tokens=2, **fields)["choices"]:
        assert choice["logprobs"]["top_logprobs"] == [None, *[{}] * 5]
    frames = stream(server, max_tokens=0, **fields)
    choices = [choice for frame in frames for choice in frame["choices"]]
    assert [len(choice["logprobs"]["tokens"]) for choice in choices] == [4, 4, 4]


def test_a_repetition_penalty_counts_the_text_of_a_state(server):
    fields = {"max_tokens": 20, "temperature": 0, "repetition_penalty": 3, "ignore_eos": True}
    text = "abé \nabé \n"
    assert server.send("POST", "/v1/states", {"prompt": text, "name": "said"})[0] == 201
    whole = server.complete(text, **fields)["choices"][0]["text"]
    assert server.complete("", state="said", **fields)["choices"][0]["text"] == whole
    server.send("DELETE", "/v1/states/said")


def test_stop_strings_cut_the_text_across_tokens_and_blocks(server):
    fields = {"temperature": 1.0, "max_tokens": 120, "seed": 5, "ignore_eos": True}
    text = server.complete("b", **fields)["choices"][0]["text"]
    for start in (0, 7, 31, 50):
        stop = text[start : start + 3]
        at = text.index(stop)
        for is_streamed in (False, True):
            if is_streamed:
                frames = stream(server, prompt="b", stop=["never", stop], **fields)
                found = "".join(c["text"] for f in frames for c in f["choices"])
                reason = frames[-1]["choices"][0]["finish_reason"]
            else:
                choice = server.complete("b", stop=[stop, "never"], **fields)["choices"][0]
                found, reason = choice["text"], choice["finish_reason"]
            assert (found, reason) == (text[:at], "stop")


def stream(server, **fields):
    status, headers, body = server.send("POST", "/v1/completions", {**fields, "stream": True})
    assert status == 200
    assert headers["Content-Type"].startswith("text/event-stream")
    *frames, done, end = body.decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def test_states_are_saved_forked_downloaded_uploaded_and_deleted(workdir, server, tmp_path):
    def send(method, path, body=None, status=200):
        found, _, content = server.send(method, "/v1/states" + path, body)
        assert found == status, content
        return content

    made = send("POST", "", {"prompt": "abc", "name": "trunk"}, 201)
    assert (made["id"], made["tokens"], made["parent"]) == ("trunk", 4, None)
    child = send("POST", "", {"prompt": " de", "parent": "trunk", "name": "branch"}, 201)
    assert (child["tokens"], child["parent"], child["text"]) == (7, "trunk", "abc de")
    assert send("POST", "/trunk/fork", {"name": "copy"}, 201)["parent"] == "trunk"
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
    assert {state["id"] for state in send("GET", "")["data"]} >= {"trunk", "branch", "saved"}
    for name in ("trunk", "branch", "copy", "again", "saved"):
        assert send("DELETE", "/" + name)["deleted"]
    send("GET", "/trunk", status=404)
    send("POST", "", {"prompt": "a", "name": ".."}, 400)
    send("GET", "/" + urllib.parse.quote("../trunk", safe=""), status=404)


REFUSED = {
    "unknown field": ({"tempera": 1}, "tempera"),
    "type": ({"max_tokens": "3"}, "max_tokens"),
    "huge integer": ({"max_tokens": 10**400}, "max_tokens"),
    "range": ({"temperature": 2.5}, "temperature"),
    "negative": ({"top_p": -0.1}, "top_p"),
    "vanishing": ({"repetition_penalty": 1e-50}, "repetition_penalty"),
    "list": ({"stop": ["a"] * 33}, "stop"),
    "echoes": ({"prompt": "a" * 600_000, "echo": True, "n": 128, "max_tokens": 0}, "echo"),
    "scores": ({"prompt": "a" * 20_000, "echo": True, "n": 16, "logprobs": 20}, "logprobs"),
    "many logprobs": ({"max_tokens": 10**7, "logprobs": 1}, "logprobs"),
    "mixed prompts": ({"prompt": ["a", 3]}, "prompt"),
    "no prompt": ({"prompt": []}, "prompt"),
    "id outside": ({"prompt": [3, 10**6]}, "prompt"),
    "negative id": ({"prompt": [-1]}, "prompt"),
    "lone surrogate": ({"prompt": "\ud800"}, None),
    "bias": ({"logit_bias": {"x": 1}}, "logit_bias"),
    "long bias": ({"logit_bias": {"0000000000999999": 1}}, "logit_bias"),
    "longer bias": ({"logit_bias": {"0" * 5000: 1}}, "logit_bias"),
    "best_of": ({"best_of": 2}, "best_of"),
    "state": ({"state": "../x"}, "state"),
    "stream_options": ({"stream_options": {}}, "stream_options"),
    "banned": ({"banned_token_ids": list(range(259))}, "banned_token_ids"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_requests_are_400_with_the_field(server, name):
    fields, param = REFUSED[name]
    status, _, body = server.send("POST", "/v1/completions", {"prompt": "a", **fields})
    assert (status, body["error"]["type"]) == (400, "invalid_request_error")
    assert body["error"]["param"] == param
    assert "Traceback" not in body["error"]["message"]


def test_bodies_that_are_no_json(server):
    for body in (b"", b"{", b'{"prompt": NaN}', b"[" * 10_000, b"\xff\xfe", b'{"prompt":"\xff"}'):
        status, _, answer = server.send("POST", "/v1/completions", body)
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error"), body[:20]
    assert server.send("GET", "/v1/nothing")[0] == 404
    assert server.send("GET", "/v1/completions")[0] == 405
    assert server.send("POST", "/v1/completions", {"model": "gpt-4"})[0] == 404
    assert server.send("POST", "/v1/completions", b" " * (1 << 24) + b"1")[0] == 413
    assert server.send("GET", "/health", x="y" * 40_000)[0] == 431


def test_tokenize_and_detokenize(server):
    _, _, body = server.send("POST", "/tokenize", {"prompt": "aé", "return_token_strs": True})
    assert body["tokens"] == [256, 97, 0xC3, 0xA9]
    assert body["token_strs"][1:] == ["a", r"bytes:\xc3", r"bytes:\xa9"]
    _, _, body = server.send("POST", "/detokenize", {"tokens": body["tokens"]})
    assert body == {"prompt": "aé"}
    assert server.send("GET", "/tokenizer_info")[2]["eos_token_id"] == 257


def test_garbage_and_slow_clients_do_not_disturb_others(server):
    host, port = server.url.removeprefix("http://").split(":")
    sockets = [socket.create_connection((host, int(port))) for _ in range(30)]
    for number, connection in enumerate(sockets):
        connection.sendall([b"\0" * 500, b"POST /v1/comp", b"GET / HTTP/1.1\r\nx: "][number % 3])
    server.complete("a", max_tokens=3)
    for connection in sockets:
        connection.close()


def test_headers_without_end_end_the_connection(server):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HTTP/1.1\r\nx: ")
        with pytest.raises(ConnectionError):
            connection.sendall(b"x" * (1 << 26))
    server.complete("a", max_tokens=3)


def wait_until_idle(server):
    while True:
        found = server.send("GET", "/slots")[2]
        if found["active"] == found["waiting"] == 0:
            return
        time.sleep(0.01)


def test_a_client_that_does_not_read_pauses_its_request_and_loses_nothing(server):
    fields = {"max_tokens": 30_000, "ignore_eos": True, "seed": 1, "logprobs": 5}

    def num_tokens():
        text = server.send("GET", "/metrics")[2].decode()
        return float(re.search("^simplernn_new_tokens (.*)$", text, re.MULTILINE)[1])

    start = num_tokens()
    with server.post(prompt="a", stream=True, **fields) as connection:
        while (before := num_tokens()) == start:
            time.sleep(0.01)
        time.sleep(0.5)
        while before != (before := num_tokens()):
            time.sleep(0.5)
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


def test_a_client_that_leaves_ends_the_prefill_of_its_state(server):
    with server.post("/v1/states", prompt="ab" * 4_000_000, name="left"):
        while server.send("GET", "/slots")[2]["waiting"] == 0:
            time.sleep(0.01)
    wait_until_idle(server)
    assert server.send("GET", "/v1/states/left")[0] == 404


@pytest.mark.parametrize(
    "headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}]
)
def test_pages_of_other_sites_are_refused(server, headers):
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/states")):
        status, _, body = server.send(method, path, {"prompt": "a"}, **headers)
        assert (status, body["error"]["type"]) == (403, "invalid_request_error")
    own = {"Origin": server.url}
    assert server.send("GET", "/v1/models", **own)[0] == 200


@pytest.mark.parametrize("after", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_clients_that_leave_free_their_slots(server, after):
    """A pipelined request hides no disconnect."""
    for is_streamed in (False, True):
        fields = {"prompt": "a", "max_tokens": 10**6, "ignore_eos": True, "stream": is_streamed}
        sockets = [server.post(**fields, after=after) for _ in range(12)]
        while server.send("GET", "/slots")[2]["active"] < 5:
            time.sleep(0.01)
        for connection in sockets:
            connection.close()
        wait_until_idle(server)


def test_a_full_queue_refuses_with_429(server):
    def complete(index):
        return server.send("POST", "/v1/completions", {"prompt": "a", "seed": index, **SAMPLED})

    with concurrent.futures.ThreadPoolExecutor(150) as pool:
        answers = list(pool.map(complete, range(150)))
    assert {status for status, _, _ in answers} <= {200, 429}
    assert all(headers["Retry-After"] for status, headers, _ in answers if status == 429)


def test_metrics_and_openapi(server):
    server.complete("abc " * 20, max_tokens=20)
    text = server.send("GET", "/metrics")[2].decode()
    values = dict(line.split(" ") for line in text.splitlines() if not line.startswith("#"))
    assert float(values["simplernn_slots"]) == 5
    assert float(values["simplernn_time_to_first_token_seconds_count"]) > 0
    document = server.send("GET", "/openapi.json")[2]
    assert "CompletionRequest" in document["components"]["schemas"]
    assert server.send("GET", "/")[2].startswith(b"<!doctype html>")


def test_key_drain_and_reload(workdir, tmp_path):
    (tmp_path / "key").write_text("secret\n")
    states = tmp_path / "states"
    flags = [f"--api_key_file={tmp_path / 'key'}", f"--state_dir={states}", "--slots=2"]
    flags += ["--allow_origin=http://a.example"]
    key = {"Authorization": "Bearer secret"}
    with serving(workdir, *flags) as server:
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "secret"}):
            assert server.send("GET", "/v1/models", **headers)[0] == 401
        assert server.send("GET", "/v1/models", **key)[0] == 200
        assert server.send("GET", "/health")[0] == 200
        # As browsers ask before a page of another site sends a key to a server on this machine.
        asked = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type",
            "Access-Control-Request-Private-Network": "true",
        }
        for origin, status in (("http://a.example", 200), ("http://b.example", 400)):
            found, headers, _ = server.send("OPTIONS", "/v1/states", Origin=origin, **asked)
            assert found == status
            allowed = server.send("GET", "/v1/models", Origin=origin, **key)[1]
            for each in (headers, allowed):
                name = each["Access-Control-Allow-Origin"]
                assert name == (origin if status == 200 else None)
        assert server.send("POST", "/v1/states", {"prompt": "ab", "name": "s"}, **key)[0] == 201
        assert server.send("POST", "/admin/reload", **key)[2] == {"reloaded": False}
        body = {"prompt": "a", "max_tokens": 3000, "seed": 1, "ignore_eos": True}
        with socket.create_connection(server.url.removeprefix("http://").split(":")) as garbage:
            garbage.sendall(b"\0\r\n\r\n")
            assert garbage.recv(100).startswith(b"HTTP/1.1 400")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(server.send, "POST", "/v1/completions", body, **key)
            while server.send("GET", "/slots", **key)[2]["active"] == 0:
                time.sleep(0.01)
            code, errors = server.stop(signal.SIGTERM)
            status, _, answer = running.result()
        assert (code, status, answer["usage"]["completion_tokens"]) == (0, 200, 3000), errors
        assert "Invalid" not in errors  # garbage fills no log
    with serving(workdir, *flags, "--max_connections=2") as server:
        body = {"prompt": "b", "state": "s", "max_tokens": 3}
        assert server.send("POST", "/v1/completions", body, **key)[0] == 200
        address = server.url.removeprefix("http://").split(":")
        with socket.create_connection(address), socket.create_connection(address):
            assert server.send("GET", "/health")[0] == 503
        while server.send("GET", "/health")[0] == 503:  # until the server sees that both are closed
            time.sleep(0.01)


def test_connections_send_small_frames_at_once():
    """Otherwise a second stream on one connection waits for a delayed acknowledgement."""
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


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
