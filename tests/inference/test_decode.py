"""`generate` equals recomputing the prefix, sequences are independent, and continuing from a state
equals one longer call."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from references import without_oldest

from simplernn_jax.config import ModelConfig
from simplernn_jax.errors import UserError
from simplernn_jax.inference import generate
from simplernn_jax.inference.engine import Engine, PrefixState, batch_sequences
from simplernn_jax.inference.sampling import Sampling
from simplernn_jax.models import LanguageModel

VOCAB = 23
KINDS = {
    "plain": {"block": "plain"},
    "hybrid": {"mixer": "attention,simple_rnn", "mixer_options": {"context": 50}},
}
# Three sequences or one in every test, so that they share the compiled programs.
LENGTHS = [3, 139, 64]  # prefilled in chunks of 1, 8 and 64 tokens
DRAWN = {"temperature": 1.0, "top_k": 9, "top_p": 0.9}

forward = nnx.jit(lambda model, tokens: model(tokens))


@functools.cache
def make_model(kind="hybrid", seed=0, cls=LanguageModel):
    config = ModelConfig(
        vocab_size=VOCAB,
        num_layers=2,
        hidden_dim=24,
        key_dim=12,
        value_dim=20,
        num_heads=2,
        mlp_dim=29,
        tie_embeddings=False,
        **KINDS[kind],
    )
    return cls(config, rngs=nnx.Rngs(seed))


def make_prompts(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).astype(np.int32) for length in lengths]


def by_recomputing(model, prompt, num_tokens):
    """Greedy decoding by its definition: the whole prefix again for every token."""
    tokens = np.zeros((1, len(prompt) + num_tokens), np.int32)  # later tokens are not seen
    tokens[0, : len(prompt)] = prompt
    for end in range(len(prompt), tokens.shape[1]):
        tokens[0, end] = jnp.argmax(forward(model, tokens)[0][0, end - 1])
    return tokens[0, len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_in_chunks_equals_the_full_forward_pass(kind):
    model = make_model(kind)
    prompts = make_prompts([3, 139, 601])
    state = generate(model, prompts, max_new_tokens=0).state
    padded = np.zeros((3, 601), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    logits, layers = forward(model, padded)
    for row, prompt in enumerate(prompts):
        expected = logits[row, len(prompt) - 1]
        chex.assert_trees_all_close(state.logits[row], expected, rtol=2e-5, atol=2e-5)
    for ours, theirs in zip(*map(jax.tree.leaves, (state.layers, layers)), strict=True):
        chex.assert_trees_all_close(ours[2], theirs[2], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_recomputing_the_prefix(kind):
    model = make_model(kind)
    prompts = make_prompts([5, 5, 5])
    generated = generate(model, prompts, max_new_tokens=37)
    chex.assert_shape(generated.tokens, (3, 37))
    assert generated.tokens.dtype == np.int32
    for prompt, row in zip(prompts, generated.tokens, strict=True):
        np.testing.assert_array_equal(row, by_recomputing(model, prompt, 37))


@pytest.mark.parametrize(
    ("lengths", "settings"),
    [(LENGTHS, {"temperature": 1.3, "seed": 5, "top_k": 9, "top_p": 0.9}), ([1, 8, 61], {})],
)
def test_a_sequence_is_the_same_alone_and_in_a_batch(lengths, settings):
    model = make_model()
    prompts = make_prompts(lengths)
    together = generate(model, prompts, max_new_tokens=35, **settings)
    for row, prompt in enumerate(prompts):
        alone = generate(model, [prompt], max_new_tokens=35, **settings)
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])
        own = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], together.state)
        chex.assert_trees_all_close(own, alone.state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("cuts", "settings"),
    [((1, 69), DRAWN), ((32, 38), {}), ((40, 0, 7, 23), DRAWN), ((40, 0, 7, 23), {})],
)
def test_continuing_equals_one_longer_call(cuts, settings):
    model = make_model()
    settings = settings | {"seed": 3, "eos_id": 0}
    prompts = make_prompts([2, 11, 5])
    whole = generate(model, prompts, max_new_tokens=sum(cuts), **settings)
    parts = [generate(model, prompts, max_new_tokens=cuts[0], **settings)]
    for cut in cuts[1:]:
        parts.append(generate(model, state=parts[-1].state, max_new_tokens=cut, **settings))
    for row, tokens in enumerate(whole.sequences()):
        pieces = np.concatenate([part.sequences()[row] for part in parts])
        np.testing.assert_array_equal(pieces, tokens)
    chex.assert_trees_all_equal(parts[-1].state, whole.state)


def test_a_prompt_is_appended_to_a_state_and_an_empty_one_leaves_it_unchanged():
    model = make_model()
    first, second = make_prompts([70, 13, 1], seed=1), make_prompts([5, 66, 0], seed=2)
    state = generate(model, first, max_new_tokens=0).state
    on = generate(model, second, state=state, max_new_tokens=9)
    joined = [np.concatenate(pair) for pair in zip(first, second, strict=True)]
    np.testing.assert_array_equal(on.tokens, generate(model, joined, max_new_tokens=9).tokens)


def test_eos_ends_a_sequence_and_freezes_its_state():
    model = make_model()
    prompts = make_prompts([3, 5, 9])
    free = generate(model, prompts, max_new_tokens=50)
    eos_id = int(free.tokens[1, 4])
    ended = generate(model, prompts, max_new_tokens=50, eos_id=eos_id)
    for row, tokens in enumerate(free.tokens):
        ends = np.flatnonzero(tokens == eos_id)
        length = ends[0] + 1 if len(ends) else 50
        assert ended.lengths[row] == length
        np.testing.assert_array_equal(ended.sequences()[row], tokens[:length])
        assert (ended.tokens[row, length:] == eos_id).all()
    # The state is that before EOS.
    before = np.concatenate([prompts[1], ended.sequences()[1][:-1]])
    _, layers = forward(model, before[None])
    own = jax.tree.map(lambda leaf: leaf[1:2], ended.state.layers)
    chex.assert_trees_all_close(*map(without_oldest, (own, layers)), rtol=2e-5, atol=2e-5)


def test_a_finished_sequence_stays_finished_until_it_gets_a_prompt():
    model = make_model()
    prompt = make_prompts([5])
    eos_id = int(generate(model, prompt, max_new_tokens=1).tokens[0, 0])
    ended = generate(model, prompt, max_new_tokens=4, eos_id=eos_id)
    assert ended.lengths.tolist() == [1]
    again = generate(model, state=ended.state, max_new_tokens=4, eos_id=eos_id)
    assert again.lengths.tolist() == [0]
    more = generate(model, [[2, 7]], state=ended.state, max_new_tokens=4)
    joined = [[*prompt[0], 2, 7]]
    np.testing.assert_array_equal(more.tokens, generate(model, joined, max_new_tokens=4).tokens)


def test_copies_of_a_prompt_get_different_texts_and_a_seed_repeats_them():
    model = make_model()
    settings = {"max_new_tokens": 20, "temperature": 5.0}
    first = generate(model, [[3, 4]] * 3, seed=1, **settings).tokens
    assert len({tuple(row) for row in first.tolist()}) == 3
    np.testing.assert_array_equal(first, generate(model, [[3, 4]] * 3, seed=1, **settings).tokens)
    assert (first != generate(model, [[3, 4]] * 3, seed=2, **settings).tokens).any()


def test_banned_ids_are_never_generated():
    model = make_model()
    banned = [0, 3, 4, 11, 22]
    for temperature in (0.0, 50.0):
        generated = generate(
            model, [[1]] * 3, max_new_tokens=61, temperature=temperature, banned_ids=banned
        )
        assert not np.isin(generated.tokens, banned).any()


def test_prompts_come_in_any_form():
    model = make_model()
    rows = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    expected = generate(model, np.asarray(rows), max_new_tokens=6).tokens
    mixed = [np.asarray([1, 2, 3], np.uint8), jnp.asarray([4, 5, 6]), range(7, 10)]
    for form in (rows, tuple(map(tuple, rows)), jnp.asarray(rows), mixed):
        np.testing.assert_array_equal(generate(model, form, max_new_tokens=6).tokens, expected)
    for flat in (rows[0], np.asarray(rows[0]), jnp.asarray(rows[0])):
        np.testing.assert_array_equal(generate(model, flat, max_new_tokens=6).tokens, expected[:1])


@pytest.mark.parametrize("eos_id", [None, 5])
def test_tokens_are_passed_on_block_by_block(eos_id):
    model = make_model()
    prompts = make_prompts([3, 8, 1])
    calls = []
    settings = {"max_new_tokens": 75, "temperature": 30.0, "eos_id": eos_id}
    whole = generate(model, prompts, on_tokens=calls.append, **settings)
    if eos_id is None:
        assert len(calls) > 1
    for row, tokens in enumerate(whole.sequences()):
        np.testing.assert_array_equal(np.concatenate([call[row] for call in calls]), tokens)


def test_nothing_is_retraced():
    traces = []

    class Counting(LanguageModel):
        def encode(self, tokens, *args, **kwargs):
            traces.append(tokens.shape)
            return super().encode(tokens, *args, **kwargs)

    generate(make_model(cls=Counting), make_prompts([9 + 64, 9]), max_new_tokens=33)
    num_traces = len(traces)
    for seed in range(1, 4):  # other parameters, prompts, lengths and settings
        model = make_model(seed=seed, cls=Counting)
        prompts = make_prompts([3 + 64 * seed, 17 + seed], seed=seed)
        settings = {"temperature": float(seed), "top_k": seed, "top_p": 1 / seed, "eos_id": seed}
        generated = generate(
            model, prompts, max_new_tokens=20 * seed, banned_ids=[seed], **settings
        )
        generate(model, state=generated.state, max_new_tokens=seed)
    assert len(traces) == num_traces


def test_decoding_copies_no_cache():
    """A cache in working memory would be copied for each token."""
    config = ModelConfig(
        vocab_size=VOCAB,
        num_layers=1,
        num_heads=2,
        mixer="attention",
        mixer_options={"context": 5000},
    )
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    state = PrefixState(model.initial_state(3), jnp.zeros((3, VOCAB)))
    zeros, settings = np.zeros(3, np.int32), Sampling().arrays(VOCAB)
    sequences = batch_sequences(state, zeros, zeros, zeros + 9, settings)
    engine = Engine(model)
    arguments = engine.weights, sequences, np.ones(3, np.bool_), np.int32(9)
    program = engine.programs.decode.lower(*arguments).compile()
    cached = state.layers[0].mixer.keys
    cached_bytes = cached.size * cached.dtype.itemsize
    assert program.memory_analysis().temp_size_in_bytes < 0.1 * cached_bytes


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_weights_that_give_no_finite_logits_are_an_error(value):
    model = with_parameters(lambda x: jnp.full_like(x, value))
    with pytest.raises(UserError, match="the model's logits are not finite: its weights are corr"):
        generate(model, [[1]], max_new_tokens=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_parameters_of_16_bits_are_refused(dtype):
    model = with_parameters(lambda x: x.astype(dtype))
    with pytest.raises(UserError, match=f"^model: has {dtype} parameters; convert them to float32"):
        generate(model, [[1]], max_new_tokens=1)


def with_parameters(change):
    """A model whose parameters are changed."""
    model = nnx.clone(make_model())
    nnx.update(model, jax.tree.map(change, nnx.state(model, nnx.Param)))
    return model
