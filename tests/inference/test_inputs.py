"""Arguments of `generate` and `generate_text`: a wrong one is named in one line."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import small_model

from simplernn_jax import devices
from simplernn_jax.data.tokenizer import ByteTokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.inference import generate, generate_text
from simplernn_jax.inference.arguments import checked_sampling
from simplernn_jax.inference.sampling import Sampling

BYTES = ByteTokenizer()
VOCAB = BYTES.vocab_size

BAD = {
    "model": [None, "a", (1, 2)],
    "max_new_tokens": [None, "1", 1.0, -1, 2**31, np.zeros((2, 2)), jnp.zeros(1)],
    "temperature": [None, "1", 1j, -0.1, np.nan, 10**400, jnp.zeros(1)],
    "top_k": [None, 1.5, -1],
    "top_p": [None, 0, 1.01, np.nan],
    "seed": [None, 0.5, -1, 2**32],
    "state": ["a", 1, (1, 2)],
    "eos_id": [1.0, -1, VOCAB],
    "banned_ids": [None, 1, [VOCAB], [1.5], range(VOCAB)],
    "prompts": [None, 3, "a", [], [[]], [[1], []], [1.5], ["a"], [[1, VOCAB]], [[-1]], [[[1]]],
                [[1, [2]]], {1: 2}, iter([1]), [None], np.float32([1]), jnp.full((2, 2), -1)],
}  # fmt: skip
TEXTS = {"prompts": [3, b"a", {"a": 1}, [1], ["a", b"b"], "\ud800"]}


@functools.cache
def model():
    return small_model("parallel")


def cases(table):
    return [(name, value) for name in table for value in table[name]]


def refusal(function, arguments):
    with pytest.raises(UserError) as caught:
        function(**{"model": model(), "max_new_tokens": 1, **arguments})
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 500
    return message


@pytest.mark.parametrize(("name", "value"), cases(BAD))
def test_a_bad_argument_of_generate_is_one_line(name, value):
    message = refusal(generate, {"prompts": [[1]], name: value})
    assert message.startswith(name.removesuffix("s"))


@pytest.mark.parametrize(("name", "value"), cases(TEXTS))
def test_a_bad_argument_of_generate_text_is_one_line(name, value):
    refusal(generate_text, {"tokenizer": BYTES, "prompts": "a", name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[1], [2, 3, -1]]}, "prompt 1: token -1 at position 2 is outside"),
        ({"prompts": [[1], []]}, "prompt 1: has no token"),
        ({"prompts": [[1.5]]}, "prompt 0: not a flat sequence of integer token ids (1 axes, flo"),
        ({"max_new_tokens": 2**31 - 1, "prompts": [[1]] * 1000}, "generating needs at least 8.59"),
        ({"max_new_tokens": 10**12}, "max_new_tokens=1000000000000: must be an integer in"),
    ],
)
def test_the_problem_is_named(arguments, message):
    assert refusal(generate, {"prompts": [[1]], **arguments}).startswith(message)


def test_more_prompts_than_memory_holds_are_refused(monkeypatch):
    monkeypatch.setattr(devices, "host_memory", lambda: 256**2)
    with pytest.raises(UserError, match=r"^generating needs at least .* MB .*; generate fewer "):
        generate(model(), [[1]] * 1000, max_new_tokens=0)


@pytest.mark.parametrize(
    ("number", "real"),
    [(int, float), (np.int32, np.float32), (np.asarray, np.asarray), (jnp.asarray, jnp.asarray)],
)
def test_numbers_of_every_type_are_accepted(number, real):
    made = checked_sampling(VOCAB, real(0.5), number(3), real(0.75), number(7), number(5), [1, 2])
    expected = Sampling(
        temperature=0.5, top_k=3, top_p=0.75, seed=7, stop_ids=(5,), banned_ids=(1, 2)
    )
    assert made == expected


def test_extreme_settings_are_accepted():
    made = checked_sampling(VOCAB, 1e300, 10**30, 1e-300, 2**32 - 1, None, ())
    assert made.temperature == np.finfo(np.float32).max
    assert made.top_k == VOCAB
