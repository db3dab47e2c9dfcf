"""scripts/serve.py under load, given newer parameters, and stopped."""

import concurrent.futures
import json
import random
import signal
import time

import pytest
from serving_process import serving
from small_runs import HYBRID, save_untrained, small_config, untrained_run

from simplernn_jax import load_model
from simplernn_jax.export.formats import TrainedModel, find_format
from simplernn_jax.inference import generate_text

pytestmark = pytest.mark.oldest_python

PROMPTS = [("ab cé" * (1 + 7 * n))[: 3 + 11 * n] for n in range(32)]


@pytest.fixture
def workdir(tmp_path):
    return untrained_run(tmp_path, **HYBRID)


def test_answers_are_the_same_bytes_alone_among_others_and_from_the_cache(workdir):
    settings = {"logprobs": 2, "temperature": 0.8, "max_tokens": 20}

    def complete(index):
        body = server.complete(PROMPTS[index], seed=index, **settings)
        return body["choices"], body["usage"]["prompt_tokens_details"]["cached_tokens"]

    def complete_all(order):
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            found = dict(zip(order, pool.map(complete, order), strict=True))
        return [found[index] for index in range(32)]

    with serving(workdir, "--slots=5") as server:
        alone = [complete(index) for index in range(30, -1, -5)]
        first = complete_all(random.Random(0).sample(range(32), 32))
        second = complete_all(range(32))
    assert [choices for choices, _ in first] == [choices for choices, _ in second]
    assert [choices for choices, _ in alone] == [choices for choices, _ in first[30::-5]]
    assert alone[0][1] == 0 < second[30][1]  # cached tokens


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
