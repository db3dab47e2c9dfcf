"""Arguments of `generate` and `generate_text`: a wrong one is named in one line."""

import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import small_model

from simplernn_jax import devices
from simplernn_jax.data.tokenizer import ByteTokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.inference import generate, generate_text
from simplernn_jax.inference.arguments import checked_sampling
from simplernn_jax.inference.sampling import Sampling

BYTES = ByteTokenizer()
VOCAB = BYTES.vocab_size


@functools.cache
def model():
    return small_model("residual")


# Neither numbers, ids, sequences of ids nor texts.
others = st.sampled_from(
    [True, b"1", 1j, {"a": 1}, object(), np.True_, np.zeros((2, 2)), jnp.zeros(1, jnp.bfloat16)]
)
no_numbers = st.none() | st.text(max_size=3) | others


def no_integers(least, most):
    """Everything but integers in the range."""
    below, above = st.integers(max_value=least - 1), st.integers(min_value=most + 1)
    return no_numbers | st.floats() | below | above


def no_reals(allowed):
    """Everything but numbers for which `allowed` holds."""
    return no_numbers | st.floats().filter(lambda x: not allowed(x))


ids = st.integers(0, VOCAB - 1)
outside = st.integers(max_value=-1) | st.integers(min_value=VOCAB)
no_ids = st.one_of(
    st.text(min_size=1, max_size=3),
    st.lists(ids, max_size=3).flatmap(lambda good: outside.map(lambda bad: [*good, bad])),
    st.sampled_from([1.5, [1.5], ["a"], [[[1]]], [[1], [2, [3]]], {1: 2}, iter([1]), [None]]),
    st.sampled_from([np.zeros((2, 2, 2), np.int32), np.float32([1]), jnp.full((2, 2), -1)]),
)

BAD = {
    "max_new_tokens": no_integers(0, 2**31 - 1),
    "temperature": no_reals(lambda x: x >= 0 and math.isfinite(x)),
    "top_k": no_numbers | st.floats() | st.integers(max_value=-1),
    "top_p": no_reals(lambda x: 0 < x <= 1),
    "seed": no_integers(0, 2**32 - 1),
    "state": st.text() | others | st.integers(),
    "model": no_numbers,
}
IDS = {
    "eos_id": no_integers(0, VOCAB - 1).filter(lambda x: x is not None),
    "banned_ids": no_ids | st.none() | st.integers() | st.just(range(VOCAB)),
    "prompts": no_ids | st.sampled_from([None, 3, [], [[]], [[1], []]]),
}
TEXT = {
    "prompts": others | st.lists(others, min_size=1, max_size=2) | st.sampled_from([3, "\ud800"])
}


def named(strategies):
    return st.sampled_from(sorted(strategies)).flatmap(
        lambda name: st.tuples(st.just(name), strategies[name])
    )


def check_refused(function, arguments, name, value):
    with pytest.raises(UserError) as caught:
        function(**{"max_new_tokens": 1, **arguments, name: value})
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 500
    return message


@given(named(BAD | IDS))
@settings(max_examples=150)
def test_a_bad_argument_of_generate_is_one_line(case):
    name, value = case
    message = check_refused(generate, {"model": model(), "prompts": [[1]]}, name, value)
    assert message.startswith(name.removesuffix("s"))


@given(named(BAD | TEXT))
@settings(max_examples=75)
def test_a_bad_argument_of_generate_text_is_one_line(case):
    name, value = case
    arguments = {"model": model(), "tokenizer": BYTES, "prompts": "a"}
    check_refused(generate_text, arguments, name, value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[1, VOCAB]]}, f"prompt 0: token {VOCAB} at position 1 is outside"),
        ({"prompts": [[1], [2, 3, -1]]}, "prompt 1: token -1 at position 2 is outside"),
        ({"prompts": [[1], []]}, "prompt 1: has no token"),
        ({"prompts": []}, "prompts: none given"),
        ({"prompts": [[1.5]]}, "prompt 0: float64 values; token ids are integers"),
        ({"prompts": [[[1]]]}, "prompt 0: has 2 axes"),
        ({"max_new_tokens": 2**31 - 1, "prompts": [[1]] * 1000}, "max_new_tokens=2147483647: "),
        ({"max_new_tokens": 10**12}, "max_new_tokens=1000000000000: must be an integer in"),
    ],
)
def test_the_problem_is_named(arguments, message):
    arguments = {"model": model(), "prompts": [[1]]} | arguments
    assert check_refused(generate, arguments, *arguments.popitem()).startswith(message)


def test_more_prompts_than_memory_holds_are_refused(monkeypatch):
    monkeypatch.setattr(devices, "host_memory", lambda: 256**2)
    with pytest.raises(UserError, match=r"^1000 prompts: needs .* MB, .*; pass fewer at a time"):
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
