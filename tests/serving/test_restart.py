"""scripts/serve.py killed, started again, and given newer parameters, all under load."""

import concurrent.futures
import http.client
import itertools
import json
import random
import signal
import time

import pytest
from serving_process import serving
from small_runs import HYBRID, save_untrained, small_config, untrained_run

from simplernn_jax import load_model
from simplernn_jax.export.formats import TrainedModel, find_format
from simplernn_jax.inference import generate_text, load_state

pytestmark = pytest.mark.oldest_python

PROMPTS = [("ab cé" * (1 + 7 * n))[: 3 + 11 * n] for n in range(32)]


@pytest.fixture
def workdir(tmp_path):
    return untrained_run(tmp_path, **HYBRID)


def complete_all(server, seed):
    """Answers of all `PROMPTS`, asked for at once in an order of `seed`, and cached tokens."""

    def complete(index):
        settings = {"seed": index, "logprobs": 2, "temperature": 0.8, "max_tokens": 20}
        return server.complete(PROMPTS[index], **settings)

    order = random.Random(seed).sample(range(32), 32)
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        bodies = dict(zip(order, pool.map(complete, order), strict=True))
    cached = [body["usage"]["prompt_tokens_details"]["cached_tokens"] for body in bodies.values()]
    return [bodies[index]["choices"] for index in range(32)], sum(cached)


def test_killed_while_it_saves_states(workdir, tmp_path):
    flags = ["--slots=5", f"--state_dir={tmp_path / 'states'}"]
    with serving(workdir, *flags) as server:
        cold, _ = complete_all(server, 0)
        warm, cached = complete_all(server, 1)
        assert warm == cold
        assert cached > 0

        def save_states(prefix):
            for number in itertools.count():
                body = {"prompt": "a", "name": f"{prefix}-{number}"}
                if server.send("POST", "/v1/states", body)[0] != 201:
                    return

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            savers = [pool.submit(save_states, prefix) for prefix in "abcd"]
            while len(list((tmp_path / "states").glob("*.safetensors"))) < 20:
                time.sleep(0.01)
            server.process.kill()
            for saver in savers:
                assert isinstance(saver.exception(), OSError | http.client.HTTPException)
    model, tokenizer, _ = load_model(str(workdir))
    saved = list((tmp_path / "states").glob("*.safetensors"))
    assert len(saved) >= 20
    for path in saved:
        load_state(path, model, tokenizer)
    # Nothing fits into this cache: every prompt is prefilled again.
    with serving(workdir, *flags, "--cache_mb=0") as server:
        listed = server.send("GET", "/v1/states")[2]["data"]
        assert {state["id"] for state in listed} == {path.stem for path in saved}
        again, cached = complete_all(server, 2)
        assert again == cold
        assert cached == 0


def test_newer_parameters_do_not_disturb_running_requests(workdir):
    config = small_config(**HYBRID, source=str(workdir.parent / "texts"))
    with serving(workdir, "--slots=5") as server:

        def scores(max_tokens):
            body = server.complete("a", max_tokens=max_tokens, logprobs=0, seed=1, ignore_eos=True)
            return body["choices"][0]["logprobs"]["token_logprobs"]

        old = scores(30)
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            running = [pool.submit(scores, 3000) for _ in range(3)]
            while server.send("GET", "/slots")[2]["active"] < 3:
                time.sleep(0.01)
            save_untrained(config, workdir, step=2, model_seed=5)
            assert server.send("POST", "/admin/reload")[2] == {"reloaded": True}
            new = scores(30)
            found = [future.result() for future in running]
        assert new != old
        assert found == [found[0]] * 3
        assert (len(found[0]), found[0][:30]) == (3000, old)
        assert server.send("POST", "/admin/reload")[2] == {"reloaded": False}
        assert scores(30) == new


def test_an_export_is_served(workdir, tmp_path):
    model, tokenizer, config = load_model(str(workdir))
    out = tmp_path / "export"
    out.mkdir()
    find_format("safetensors").write(TrainedModel(model, tokenizer, config, "run"), out)
    with serving(out, "--slots=2") as server:
        text = server.complete("ab", max_tokens=9, temperature=0)["choices"][0]["text"]
        assert server.send("POST", "/admin/reload")[2] == {"reloaded": False}
        code, errors = server.stop(signal.SIGINT)
        assert (code, "Traceback" in errors) == (0, False), errors
    assert text == generate_text(model, tokenizer, "ab", max_new_tokens=9)[0]


def test_a_stream_that_does_not_end_in_time_ends_with_an_error(workdir):
    with serving(workdir, "--slots=2", "--drain_timeout=0.5") as server:
        body = {"prompt": "a", "max_tokens": 10**6, "ignore_eos": True, "stream": True}
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(server.send, "POST", "/v1/completions", body)
            while server.send("GET", "/slots")[2]["active"] == 0:
                time.sleep(0.01)
            code, errors = server.stop(signal.SIGTERM)
            status, _, content = running.result()
    assert (code, status) == (0, 200), errors
    *_, last, end = content.decode().split("\n\n")
    assert end == ""
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server is stopping"
