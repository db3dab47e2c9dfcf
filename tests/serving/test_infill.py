"""Completion at a cursor over HTTP: ``POST /infill``, and `suffix` of ``/v1/completions``."""

import concurrent.futures
import itertools
import re
import time

import pytest
from processes import serving
from references import needs_compiler
from small_runs import untrained_run

from simplernn_jax import load_model
from simplernn_jax.inference.text import suggest

BEFORE = "abc é\n" * 200
AFTER = "\n\nbcd é\n"
LLAMA_VIM = {
    **{"id_slot": 0, "model": "", "input_prefix": BEFORE, "input_suffix": AFTER, "stop": []},
    "input_extra": [{"text": "cba\n" * 30, "time": [1, 2], "filename": "a.txt"}],
    **{"n_predict": 40, "n_indent": 4, "top_k": 40, "top_p": 0.90, "samplers": ["top_k", "infill"]},
    **{"stream": False, "cache_prompt": True, "t_max_prompt_ms": 60_000, "t_max_predict_ms": 6e4},
    "response_fields": ["content", "truncated", "tokens_cached", "timings/prompt_n"],
}
"""Fields of llama.vim's requests."""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return untrained_run(folder, block="parallel", tokenizer="bpe:290", fim_rate=0.5)


@pytest.fixture(scope="module")
def server(workdir):
    with serving(workdir, "--slots=8", "--max_queue=40") as process:
        yield process


def infill(server, **fields):
    status, _, body = server.send("POST", "/infill", fields)
    assert status == 200, body
    return body


@needs_compiler
def test_one_more_character_costs_a_step_or_two(server):
    typed, most = "    ab", 10_000
    for character in "c de abc d":
        found = infill(server, **LLAMA_VIM, prompt=typed)
        assert set(found) == set(LLAMA_VIM["response_fields"])
        assert found["timings/prompt_n"] + found["tokens_cached"] > 1000
        assert found["timings/prompt_n"] <= most
        typed, most = typed + character, 4  # the last tokens of a word may be others


@needs_compiler
def test_a_prompt_that_will_begin_differently_is_prefilled_ahead(server):
    def num_prompt_tokens():
        text = server.send("GET", "/metrics")[2].decode()
        return float(re.search(r"(?m)^simplernn_prompt_tokens_total (\S+)", text)[1])

    body = {"input_prefix": "dcba\n" * 51, "n_predict": 1}  # 255 characters
    before, length = num_prompt_tokens(), infill(server, **body, prompt="a")["tokens_evaluated"]
    deadline = time.monotonic() + 60
    while num_prompt_tokens() < before + 2 * length - 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    found = infill(server, **body, prompt="ab")
    assert found["timings"]["prompt_n"] <= 4
    assert found["tokens_cached"] > length - 4


def test_a_client_prepares_the_context_of_its_next_request(server):
    extra = [{"text": "dcb \n" * 200}]
    body = {"input_extra": extra, "n_predict": 0, "t_max_prompt_ms": 1, "response_fields": [""]}
    assert infill(server, **body) == {}
    assert infill(server, input_extra=extra, prompt="a", n_predict=1)["tokens_cached"] > 500


def test_the_answer_is_the_suggestion_of_the_library_and_of_openai_s_suffix(workdir, server):
    model, tokenizer, _ = load_model(str(workdir))
    for typed in ("ab", "abc ", ""):
        (expected,) = suggest(model, tokenizer, BEFORE + typed, AFTER, max_new_tokens=30)
        body = {"input_prefix": BEFORE, "prompt": typed, "input_suffix": AFTER}
        found = infill(server, **body, n_predict=30)
        fields = {"suffix": AFTER, "max_tokens": 30, "temperature": 0}
        completion = server.complete(BEFORE + typed, **fields)
        assert found["content"] == completion["choices"][0]["text"] == expected
        assert found["tokens_evaluated"] == completion["usage"]["prompt_tokens"]
        assert found["stop_type"] == ("limit" if found["tokens_predicted"] == 30 else "eos")


def test_a_request_gives_the_same_bytes_alone_and_among_31_others(server):
    sampled = {"temperature": 0.9, "seed": 7}
    bodies = []
    for number in range(8):
        text = {"input_prefix": BEFORE[: 97 * number + 8], "input_suffix": AFTER, "n_predict": 30}
        suffix = {"prompt": BEFORE[: 91 * number + 9], "suffix": AFTER, "max_tokens": 30}
        bodies += [("/infill", text), ("/infill", text | sampled)]
        bodies += [("/v1/completions", suffix | {"n": 2, "temperature": 0})]
        bodies += [("/v1/completions", suffix | sampled | {"logprobs": 2})]

    def answer(request):
        status, _, found = server.send("POST", *request)
        assert status == 200, found
        return found.get("choices") or (found["content"], found["stop_type"])

    alone = [answer(body) for body in bodies]
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        assert list(pool.map(answer, bodies)) == alone
    assert len({str(one) for one in alone}) > 16


def test_a_stop_string_is_named(server):
    body = {"input_prefix": "abc", "temperature": 1, "seed": 5, "n_predict": 30}
    text = infill(server, **body)["content"]
    word = text[3:6]
    stopped = infill(server, **body, stop=[word, "never"])
    assert stopped["content"] == text[: text.index(word)]
    assert (stopped["stop_type"], stopped["stopping_word"]) == ("word", word)
    # Also by the ids that have one, unless it was typed.
    for stop, typed in itertools.product("\n cé", ("", "abc", "abc ", BEFORE, BEFORE + "abc")):
        body |= {"input_prefix": typed}
        whole, ended = infill(server, **body), infill(server, **body, stop=[stop])
        assert ended["content"] == whole["content"].partition(stop)[0]
        assert ended["tokens_predicted"] <= whole["tokens_predicted"]


def test_limits_of_time_end_prompt_and_prediction(server):
    """Without them, each request takes minutes."""
    extra = [{"text": f"{number} " * 50_000} for number in range(9)]
    cut = infill(server, input_extra=extra, prompt="abc", n_predict=2, t_max_prompt_ms=100)
    assert cut["truncated"]
    assert 3 < cut["tokens_evaluated"] < 100_000
    long = infill(server, prompt="ab", n_predict=10**7, ignore_eos=True, t_max_predict_ms=300)
    assert (long["stop_type"], long["truncated"]) == ("limit", False)
    assert 0 < long["tokens_predicted"] < 10**7
    assert 290 < long["timings"]["predicted_ms"] < 10_000
