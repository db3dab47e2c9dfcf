"""Bodies of requests, and what a model makes of them, without a server."""

import contextlib
import json
from unittest import mock

import hypothesis
import msgspec
import pytest
from hypothesis import strategies
from small_runs import small_model

from simplernn_jax.data.tokenizer import ByteTokenizer
from simplernn_jax.serving.requests import (
    MAX_PROMPTS,
    ChatRequest,
    CompletionRequest,
    InfillRequest,
    RequestError,
    StateRequest,
    parse,
)
from simplernn_jax.serving.service import Service
from simplernn_jax.serving.states import StateFolder
from simplernn_jax.serving.worker import Worker


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """A service whose worker does not run."""
    model, folder = small_model("parallel"), tmp_path_factory.mktemp("states")
    worker = Worker(model, num_slots=2, cache_bytes=0, max_waiting=1)
    states = StateFolder(str(folder), model, ByteTokenizer(), 1 << 30)
    template = mock.Mock(render=mock.Mock(return_value="a"), stop="\4")
    vocab_size = model.config.vocab_size
    return Service(worker, ByteTokenizer(), vocab_size, "base", states, template)


WRONG = {
    "unknown field": ({"tempera": 1}, "tempera"),
    "type": ({"max_tokens": "3"}, "max_tokens"),
    "range": ({"temperature": 2.5}, "temperature"),
    "echoes": ({"prompt": "a" * 600_000, "echo": True, "n": 128, "max_tokens": 0}, "echo"),
    "scores": ({"prompt": "a" * 20_000, "echo": True, "n": 16, "logprobs": 20}, "logprobs"),
    "many logprobs": ({"max_tokens": 10**7, "logprobs": 1}, "logprobs"),
    "mixed prompts": ({"prompt": ["a", 3]}, "prompt"),
    "no prompt": ({"prompt": []}, "prompt"),
    "many prompts": ({"prompt": [[1]] * (MAX_PROMPTS + 1)}, "prompt"),
    "id outside": ({"prompt": [3, 10**6]}, "prompt"),
    "bias outside": ({"logit_bias": {"999999": 1}}, "logit_bias"),
    "best_of": ({"best_of": 2}, "best_of"),
    "suffix of ids": ({"prompt": [[1], [2]], "suffix": "a"}, "suffix"),
    "suffix and echo": ({"prompt": "a", "suffix": "a", "echo": True}, "suffix"),
    "suffix without infilling": ({"prompt": ["a", "b"], "suffix": "a"}, "prompt"),
    "state": ({"state": "../x"}, "state"),
    "stream_options": ({"stream_options": {}}, "stream_options"),
    "banned": ({"banned_token_ids": list(range(259))}, "banned_token_ids"),
    "tools": ({"tools": [{"type": "function"}]}, "tools"),
    "response_format": ({"response_format": {"type": "json_object"}}, "response_format"),
}
WRONG_INFILLS = {
    "without infilling": ({"input_prefix": "a", "prompt": "b"}, "prompt"),
    "grammar": ({"grammar": "root ::= [a-z]"}, "grammar"),
    "tokens as prompt": ({"prompt": [1]}, "prompt"),
    "n_predict": ({"n_predict": -2}, "n_predict"),
    "extra": ({"input_extra": [{"filename": "a"}]}, "input_extra"),
    "long limit": ({"t_max_predict_ms": 1e10}, "t_max_predict_ms"),
    "many digits": ({"t_max_prompt_ms": 10**400}, "t_max_prompt_ms"),
    "several": ({"n": 2}, "n"),
    "stream": ({"stream": True}, "stream"),
    "banned": ({"banned_token_ids": list(range(259))}, "banned_token_ids"),
}
USER = {"role": "user", "content": "a"}
WRONG_CHATS = {
    "required field": ({}, "messages"),
    "no message": ({"messages": []}, "messages"),
    "role": ({"messages": [{"role": "tool", "content": "a"}]}, "messages"),
    "top_logprobs": ({"messages": [USER], "top_logprobs": 3}, "top_logprobs"),
    "two lengths": (
        {"messages": [USER], "max_tokens": 3, "max_completion_tokens": 3},
        "max_tokens",
    ),
    "many logprobs": ({"messages": [USER], "max_tokens": 10**7, "logprobs": True}, "logprobs"),
    "no object": ([], None),
}


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        *((CompletionRequest, *case) for case in WRONG.values()),
        *((ChatRequest, *case) for case in WRONG_CHATS.values()),
        *((InfillRequest, *case) for case in WRONG_INFILLS.values()),
    ],
    ids=[
        *WRONG,
        *(f"chat: {name}" for name in WRONG_CHATS),
        *(f"infill: {name}" for name in WRONG_INFILLS),
    ],
)
def test_wrong_requests_are_rejected_with_the_field(service, kind, fields, param):
    with pytest.raises(RequestError) as found:
        service.jobs(parse(kind, json.dumps(fields).encode()), None)
    assert (found.value.status, found.value.param) == (400, param)
    assert (param or "") in found.value.message
    assert "`$" not in found.value.message


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"prompt": NaN}', b"[" * 10_000, b"\xff\xfe", b'{"prompt":"\\ud800"}'],
    ids=range(6),
)
def test_bodies_that_are_no_json(body):
    with pytest.raises(RequestError) as found:
        parse(CompletionRequest, body)
    assert found.value.param is None


ANY = strategies.recursive(
    strategies.sampled_from([None, True, -1, 0, 0.5, 3, 2**31, 2**64, 1e300, "", "a", "\0é\\"]),
    lambda values: strategies.lists(values) | strategies.dictionaries(strategies.text(), values),
    max_leaves=4,
)
MESSAGES = strategies.just([{"role": "user", "content": "a"}]) | ANY


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest, InfillRequest, StateRequest])
@hypothesis.given(data=strategies.data())
def test_random_bodies_are_answered_or_rejected(service, kind, data):
    fields = [field.encode_name for field in msgspec.structs.fields(kind)]
    chosen = data.draw(strategies.sets(strategies.sampled_from(fields), max_size=3))
    body = {name: data.draw(ANY) for name in chosen}
    if kind is ChatRequest:
        body["messages"] = data.draw(MESSAGES)
    with contextlib.suppress(RequestError):
        assert service.jobs(parse(kind, json.dumps(body).encode()), None)


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


def test_fields_of_llama_cpp_that_tune_what_is_missing_change_nothing():
    tuning = {"samplers": ["top_k", "infill"], "dry_multiplier": 0.0, "mirostat_tau": 5, "lora": []}
    tuning |= {"id_slot": -1, "cache_prompt": True, "seed": -1, "repeat_penalty": 1.5}
    found = parse(InfillRequest, json.dumps({"prompt": "a", **tuning}).encode())
    assert found == InfillRequest(prompt="a", repetition_penalty=1.5)


def test_neutral_values_of_other_fields_change_nothing(service):
    plain = CompletionRequest(prompt="ab", seed=1)
    body = {"prompt": "ab", "seed": 1, "best_of": 1, "suffix": "", **NEUTRAL}
    neutral = parse(CompletionRequest, json.dumps(body).encode())
    jobs = [service.jobs(request, None)[0] for request in (plain, neutral)]
    assert jobs[0].tokens.tolist() == jobs[1].tokens.tolist() == [256, 97, 98]
    assert jobs[0].sampling == jobs[1].sampling
    parse(CompletionRequest, json.dumps(dict.fromkeys(NEUTRAL)).encode())
    parse(ChatRequest, json.dumps({"messages": [USER], **NEUTRAL}).encode())


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (None, [[256]]),
        ('["a"]', [[256, *b'["a"]']]),
        ([1, 2], [[1, 2]]),
        (["a", "b"], [[256, 97], [256, 98]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts_of_every_form(service, prompt, expected):
    request = parse(CompletionRequest, json.dumps({"prompt": prompt}).encode())
    assert [job.tokens.tolist() for job in service.jobs(request, None)] == expected


def test_a_prompt_that_is_given_several_times_gets_other_random_streams(service):
    request = CompletionRequest(prompt=["a", "b", "a"], n=2, seed=7)
    assert [job.first_stream for job in service.jobs(request, None)] == [0, 0, 2]
