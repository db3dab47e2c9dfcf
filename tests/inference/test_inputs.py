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
from simplernn_jax.inference.arguments import checked_prompts, checked_sampling
from simplernn_jax.inference.sampling import Sampling

BYTES = ByteTokenizer()
VOCAB = BYTES.vocab_size


@functools.cache
def model():
    return small_model("residual")


# Neither numbers, ids, sequences of ids, texts nor functions.
others = st.one_of(
    st.booleans(),
    st.binary(),
    st.complex_numbers(),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.just(object()),
    st.just(np.bool_(True)),
    st.just(np.zeros((2, 2))),
    st.just(jnp.zeros((1,), jnp.bfloat16)),
)
no_numbers = st.none() | st.text(max_size=3) | others


def no_integers(least, most):
    """Everything but integers in the range."""
    below, above = st.integers(max_value=least - 1), st.integers(min_value=most + 1)
    return no_numbers | st.floats() | below | above | st.just(10**5000)


def no_reals(allowed):
    """Everything but numbers for which `allowed` holds."""
    return no_numbers | st.floats().filter(lambda x: not allowed(x)) | st.just(10**400)


ids = st.integers(0, VOCAB - 1)
outside = st.integers(max_value=-1) | st.integers(min_value=VOCAB)
no_ids = st.one_of(
    st.floats(),
    st.text(min_size=1, max_size=3),
    st.lists(ids, max_size=3).flatmap(lambda good: outside.map(lambda bad: [*good, bad])),
    st.lists(st.floats(), min_size=1, max_size=3),
    st.lists(st.text(max_size=2), min_size=1, max_size=3),
    st.just([[[1]]]),
    st.just([[1], [2, [3]]]),
    st.just(np.zeros((2, 2, 2), np.int32)),
    st.just(np.float32([1])),
    st.just(jnp.full((2, 2), -1)),
    st.just({1: 2}),
    st.just(iter([1])),
    st.just([None]),
)

BAD = {
    "max_new_tokens": no_integers(0, 2**31 - 1),
    "temperature": no_reals(lambda x: x >= 0 and math.isfinite(x)),
    "top_k": no_numbers | st.floats() | st.integers(max_value=-1),
    "top_p": no_reals(lambda x: 0 < x <= 1),
    "seed": no_integers(0, 2**32 - 1),
    "state": st.text() | others | st.integers(),
}
IDS = {
    "eos_id": no_integers(0, VOCAB - 1).filter(lambda x: x is not None),
    "banned_ids": no_ids | st.none() | st.integers() | st.just(range(VOCAB)),
    "on_tokens": st.text() | others | st.integers(),
    "prompts": no_ids | st.sampled_from([None, 3, [], [[]], [[1], []]]),
}
TEXT = {
    "prompts": others | st.lists(others, min_size=1, max_size=2) | st.sampled_from([3, "\ud800"]),
    "on_text": st.text() | others | st.integers(),
    "tokenizer": no_numbers,
    "model": no_numbers,
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
@settings(max_examples=250)
def test_a_bad_argument_of_generate_is_one_line(case):
    name, value = case
    message = check_refused(generate, {"model": model(), "prompts": [[1]]}, name, value)
    assert message.startswith(name.removesuffix("s"))


@given(named(BAD | TEXT))
@settings(max_examples=200)
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
        ({"prompts": None}, "prompts: none given"),
        ({"prompts": [[1.5]]}, "prompt 0: float64 values; token ids are integers"),
        ({"prompts": [[[1]]]}, "prompt 0: has 2 axes"),
        ({"banned_ids": range(VOCAB)}, "banned_ids: all tokens are banned"),
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


@given(
    number=st.sampled_from([int, np.int32, np.uint8, np.asarray, jnp.asarray]),
    real=st.sampled_from([float, np.float32, np.float64, np.asarray, jnp.asarray]),
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


@given(st.lists(st.lists(ids, min_size=1, max_size=5), min_size=1, max_size=4))
def test_valid_prompts_are_unchanged(prompts):
    rows = checked_prompts(prompts, VOCAB, None)
    assert [row.tolist() for row in rows] == prompts
    assert {row.dtype for row in rows} == {np.dtype(np.int32)}
