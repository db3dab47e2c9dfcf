"""Decoder state as a value: forks, and files that load bit-exactly or are refused in one line."""

import dataclasses
import os
import random

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from simplernn_jax.config import ModelConfig
from simplernn_jax.data.tokenizer import ByteTokenizer, CharTokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.inference import fork_state, generate, generate_text, load_state, save_state
from simplernn_jax.inference.state import encode_state, fingerprints
from simplernn_jax.models import LanguageModel

BYTES = ByteTokenizer()
DRAWN = {"temperature": 1.0, "seed": 3}
CONFIG = ModelConfig(
    vocab_size=BYTES.vocab_size,
    num_layers=1,
    hidden_dim=11,
    key_dim=6,
    value_dim=14,
    num_heads=2,
    mlp_dim=13,
)


@pytest.fixture(scope="module")
def model():
    return LanguageModel(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def state(model):
    """Two sequences in the middle of a text."""
    prompts = [[1, 2, 3], list(range(70, 90))]
    return generate(model, prompts, max_new_tokens=5, **DRAWN).state


@pytest.fixture
def path(tmp_path, model, state):
    """File of `state`."""
    path = tmp_path / "text.safetensors"
    save_state(str(path), state, model, BYTES)
    return path


def sequence(state, index):
    return jax.tree.map(lambda leaf: leaf[index : index + 1], state)


def refusal(path, model, tokenizer=BYTES):
    """The message with which the file at `path` is rejected, without the path at its start."""
    with pytest.raises(UserError) as caught:
        load_state(str(path), model, tokenizer)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def reloaded(path, state, model, tokenizer=BYTES):
    save_state(str(path), state, model, tokenizer)
    return load_state(str(path), model, tokenizer)


def assert_equal(loaded, state):
    chex.assert_trees_all_equal_shapes_and_dtypes(loaded, state)
    chex.assert_trees_all_equal(loaded, state)


def test_a_file_loads_bit_exactly_with_an_equal_model_and_tokenizer(path, model, state):
    again = LanguageModel(dataclasses.replace(CONFIG), rngs=nnx.Rngs(0))
    for equal in (model, again):
        assert_equal(load_state(str(path), equal, ByteTokenizer()), state)


def test_a_cache_of_keys_and_values_goes_through_a_file(tmp_path):
    config = dataclasses.replace(
        CONFIG, key_dim=12, mixer="attention", mixer_options={"context": 7}, precision="bfloat16"
    )
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    state = generate(model, [[1, 2, 3], list(range(70, 90))], max_new_tokens=9, **DRAWN).state
    assert state.layers[0].mixer.keys.dtype == "bfloat16"
    assert_equal(reloaded(tmp_path / "state", state, model), state)


@pytest.mark.parametrize("name", ["missing/state", ".", "\0"])
def test_a_path_that_cannot_be_read_is_named(tmp_path, model, name):
    path = f"{tmp_path}/{name}"
    with pytest.raises(UserError, match=r"cannot be read \("):
        load_state(path, model, BYTES)


@pytest.mark.parametrize("change", [{"precision": "bfloat16"}, {"num_heads": 1}, {}])
def test_other_parameters_or_another_configuration_of_them_are_refused(path, model, change):
    other = LanguageModel(dataclasses.replace(CONFIG, **change), rngs=nnx.Rngs(0))
    nnx.update(other, nnx.state(model, nnx.Param))
    if not change:
        bias = other.layers[0].mixer.cell.gate_proj.bias
        bias.set_value(bias[...].at[3].add(1e-7))
    message = refusal(path, other)
    assert message.startswith("the state is of another model;")
    assert "--checkpoint=STEP" in message
    message = refusal(path, model, CharTokenizer("acb"))
    assert message.startswith("the state is of another tokenizer;")


def test_every_damage_is_refused(path, model):
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    positions = [*range(0, header, 3), *draw.choices(range(header, len(whole)), k=50)]
    for position in [*positions, len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        message = refusal(path, model)
        assert position < header or message.startswith("corrupted;")
    for content in (*(whole[:size] for size in range(0, len(whole), 101)), whole + b"\0"):
        path.write_bytes(content)
        assert refusal(path, model).startswith("corrupted, or not a state (")


def test_other_files_are_refused(path, model):
    newer = path.read_bytes().replace(b'"version":"1"', b'"version":"2"')
    for content in (b"Once upon a time", bytes(1000)):
        path.write_bytes(content)
        assert refusal(path, model).startswith("corrupted, or not a state (")
    for content in (safetensors.numpy.save({"weight": np.zeros(3)}), newer):
        path.write_bytes(content)
        assert refusal(path, model).startswith("no state in version 1 of the format;")


def test_ids_outside_the_vocabulary_are_refused(path, model, state):
    wrong = dataclasses.replace(state, recent=state.recent.at[1, -1].set(CONFIG.vocab_size))
    path.write_bytes(encode_state(wrong, fingerprints(model, BYTES)))
    assert refusal(path, model).startswith("has ids outside the vocabulary;")


def test_a_file_larger_than_memory_is_not_read(path, model, monkeypatch):
    monkeypatch.setattr("simplernn_jax.inference.state.host_memory", lambda: 64)
    assert refusal(path, model).startswith("cannot be read (larger than 32 bytes);")


def test_a_forked_prefix_continues_as_repeated_prompts(model):
    prompts = [[9, 8, 7], [5]]
    prefix = generate(model, prompts, max_new_tokens=0).state
    forked = generate(model, state=fork_state(prefix, 3), max_new_tokens=21, **DRAWN).tokens
    given = generate(model, [prompts[0]] * 3 + [prompts[1]] * 3, max_new_tokens=21, **DRAWN).tokens
    np.testing.assert_array_equal(forked, given)


def test_repeated_forks_have_streams_of_their_own(state):
    copies = sequence(state, 0)
    chex.assert_trees_all_equal(fork_state(copies, 1), copies)
    for n in (3, 2, 2):
        copies = fork_state(copies, n)
    assert len(set(copies.stream.tolist())) == 12


@pytest.mark.parametrize("n", [0, 1.0, 2**31])
def test_other_numbers_of_copies_are_refused(state, n):
    with pytest.raises(UserError, match=rf"n={n!r}: must be an integer in \[1, 2147483647\]"):
        fork_state(state, n)


def test_only_a_state_is_forked_or_saved(tmp_path, model, state):
    for call in (lambda: fork_state("state", 2), lambda: save_state("x", None, model, BYTES)):
        with pytest.raises(UserError, match="pass the state that generate or load_state ret"):
            call()
    larger = LanguageModel(dataclasses.replace(CONFIG, num_layers=2), rngs=nnx.Rngs(0))
    for other, owner in ((dataclasses.replace(state, position=None), model), (state, larger)):
        with pytest.raises(UserError, match="use the model that made it"):
            save_state(tmp_path / "state", other, owner, BYTES)
    assert not os.listdir(tmp_path)
    with pytest.raises(UserError, match=r"^model: NoneType; pass the LanguageModel of load_model"):
        load_state(tmp_path / "state", None, BYTES)


class Euros(ByteTokenizer):
    """Every token stands for the next byte of the same text."""

    def decode_bytes(self, ids):
        num_bytes = sum(int(token) < 256 for token in ids)
        return ("€" * num_bytes).encode()[:num_bytes]


def test_a_character_that_a_state_cuts_is_completed(tmp_path, model):
    tokenizer = Euros()
    first = generate_text(model, tokenizer, ["", ""], max_new_tokens=17)
    assert first == ["€€€€€\ufffd"] * 2
    loaded = reloaded(tmp_path / "state", first.state, model, tokenizer)
    assert generate_text(model, tokenizer, state=loaded, max_new_tokens=4) == ["€€"] * 2


def test_one_text_is_read_by_every_sequence(model, state):
    both = generate_text(model, BYTES, "né", state=state, max_new_tokens=3, **DRAWN)
    each = generate_text(model, BYTES, ["né", "né"], state=state, max_new_tokens=3, **DRAWN)
    ids = generate(model, [BYTES.encode("né")] * 2, state=state, max_new_tokens=3, **DRAWN).state
    chex.assert_trees_all_equal(both.state, each.state, ids)
    with pytest.raises(UserError, match="prompts: 3 for 2 sequences"):
        generate_text(model, BYTES, ["a", "b", "c"], state=state, max_new_tokens=3)
