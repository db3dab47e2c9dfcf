"""Mixers of flash-linear-attention against their equations, token by token in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simplernn_jax.config import Config, ModelConfig, TrainConfig, validate
from simplernn_jax.errors import UserError
from simplernn_jax.models.mixers.token_mixer import make_mixer
from simplernn_jax.ops.attention import ROTARY_BASE

EPSILON = 1e-4
HEADS, KEY_DIM, VALUE_DIM, LENGTH = 2, 4, 3, 9
SIZES = {
    "block": "swiglu",
    "hidden_dim": 10,
    "key_dim": HEADS * KEY_DIM,
    "value_dim": HEADS * VALUE_DIM,
    "num_heads": HEADS,
    "norm_epsilon": EPSILON,
    "precision": "float64",
}
OPTIONS = {
    "retnet": [{"short_convolution": 0}, {"short_convolution": 3}],
    "hgrn2": [{"short_convolution": 3}],
    "mamba2": [{"short_convolution": 4}],
    "gated_delta_net": [
        {"short_convolution": 0},
        {"short_convolution": 3, "negative_eigenvalues": True},
    ],
}
CASES = [(name, options) for name, several in OPTIONS.items() for options in several]
ANGLES = ROTARY_BASE ** (-np.arange(KEY_DIM // 2) / (KEY_DIM // 2))
COS, SIN = np.diag(np.cos(ANGLES)), np.diag(np.sin(ANGLES))
ROTATION = np.block([[COS, -SIN], [SIN, COS]])
"""Rotates key channels by one token."""
# Angles of the rotary embedding are multiples of 2^-32 turns.
TOLERANCE = {"retnet": 1e-7}


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def norm(x, epsilon=EPSILON):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + epsilon)


def unit(x):
    return x / jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-6)


def gates_of_time_steps(mixer, dt):
    steps = jax.nn.softplus(dt + mixer.dt_bias[...])
    return steps, jnp.exp(-jnp.exp(mixer.A_log[...]) * steps)


def token(name, mixer, x, q, k, v, state):
    """State and output of one token: ``[H, K, V]`` and the input of the output projection."""
    q, k, v = (y.reshape(HEADS if y.size > KEY_DIM else 1, -1) for y in (q, k, v))
    outer = functools.partial(jnp.einsum, "hk,hv->hkv")
    if name == "retnet":
        gates = 1 - 2.0 ** (-5 - np.arange(HEADS))
        state = gates[:, None, None] * jnp.einsum("lk,hlv->hkv", ROTATION, state) + outer(k, v)
    elif name == "hgrn2":
        bound = jax.nn.sigmoid(mixer.lower_bound[...]).reshape(k.shape)
        gates = bound + (1 - bound) * jax.nn.sigmoid(k)
        state = gates[..., None] * state + outer(1 - gates, v)
        q = jax.nn.silu(q)
    elif name == "mamba2":
        steps, gates = gates_of_time_steps(mixer, x @ mixer.dt_proj.kernel[...])
        q, k = (jnp.broadcast_to(y, (HEADS, KEY_DIM)) for y in (q * KEY_DIM**0.5, k))
        state = gates[:, None, None] * state + outer(k, steps[:, None] * v)
    else:
        strength = jax.nn.sigmoid(x @ mixer.strength_proj.kernel[...]) * mixer.max_strength
        gates = gates_of_time_steps(mixer, x @ mixer.decay_proj.kernel[...])[1]
        q, k = unit(q), unit(k)
        keep = jnp.eye(KEY_DIM)[None] - strength[:, None, None] * k[:, :, None] * k[:, None]
        state = gates[:, None, None] * (keep @ state) + outer(strength[:, None] * k, v)
    y = jnp.einsum("hk,hkv->hv", q, state) * KEY_DIM**-0.5
    if name == "hgrn2":
        return state, norm(y.ravel(), 1e-5) * mixer.head_norm.scale[...]
    gate = jax.nn.silu(x @ mixer.output_gate_proj.kernel[...])
    if name == "mamba2":
        y = (y + mixer.D[...][:, None] * v).ravel() * gate
        return state, norm(y) * mixer.norm.scale[...]
    return state, (norm(y) * mixer.head_norm.scale[...][None]).ravel() * gate


def equations(name, mixer, x, state, ids):
    """The mixer for one sequence ``[T, D]``: outputs and the final state."""
    outputs, (recurrent, pasts) = [], state
    for t in range(len(x)):
        if t and ids[t] != ids[t - 1]:
            recurrent, pasts = jax.tree.map(jnp.zeros_like, (recurrent, pasts))
        heads, now = [], {}
        for part in ("query", "key", "value"):
            y = x[t] @ getattr(mixer, f"{part}_proj").kernel[...]
            if pasts is not None:
                convolution = mixer.convolutions[part]
                recent = jnp.concatenate([pasts[part], y[None]])
                now[part] = recent[1:]
                y = jnp.sum(recent[::-1] * convolution.weights[...], axis=0)
                y = y if convolution.bias is None else y + convolution.bias[...]
            if (pasts is not None and name != "hgrn2") or name == "gated_delta_net":
                y = jax.nn.silu(y)
            heads.append(y)
        pasts = now if pasts is not None else None
        recurrent, y = token(name, mixer, x[t], *heads, recurrent)
        outputs.append(y @ mixer.out_proj.kernel[...])
    return jnp.stack(outputs), (recurrent, pasts)


def mixer_and_inputs(name, options):
    config = ModelConfig(mixer=name, mixer_options=options, **SIZES)
    graph, params = nnx.split(make_mixer(name, config, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: jnp.asarray(np.float64(p) + 0.5 * random.normal(size=p.shape)), params
    )
    x = random.normal(size=(2, LENGTH, SIZES["hidden_dim"]))
    zeros = nnx.merge(graph, params).initial_state(2)
    state = jax.tree.map(lambda s: jnp.asarray(random.normal(size=s.shape)), zeros)
    return graph, (params, jnp.asarray(x), state)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_outputs_states_and_gradients(name, options):
    graph, inputs = mixer_and_inputs(name, options)
    ids = np.array([[3, 3, 3, 3, 3, 4, 4, 4, 3], [7] * LENGTH], np.int32)

    @jax.jit
    def found(params, x, state):
        y, state = nnx.merge(graph, params)(x, state, jnp.asarray(ids))
        return y, tuple(state)

    @jax.jit
    def expected(params, x, state):
        mixer = nnx.merge(graph, params)
        results = [
            equations(name, mixer, x[i], jax.tree.map(lambda s, i=i: s[i], tuple(state)), ids[i])
            for i in range(2)
        ]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *results)

    def value_and_gradients(function):
        outputs, gradient = jax.vjp(function, *inputs)
        return outputs, gradient(jax.tree.map(lambda y: jnp.cos(3 * y), outputs))

    results, references = map(value_and_gradients, (found, expected))
    pairs = zip(jax.tree.leaves(results), jax.tree.leaves(references), strict=True)
    for one, other in pairs:
        error = np.abs(one - other).max() / max(1, np.abs(other).max())
        assert error <= TOLERANCE.get(name, 1e-11)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_sequence_in_parts_and_the_initial_state(name):
    graph, (params, x, _) = mixer_and_inputs(name, OPTIONS[name][-1])
    mixer = nnx.merge(graph, params)
    whole, final = mixer(x)
    parts, state = [], mixer.initial_state(2)
    for start, end in ((0, 1), (1, 1), (1, 6), (6, LENGTH)):
        y, state = mixer(x[:, start:end], state)
        parts.append(y)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-8)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(final), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixer": "retnet", "key_dim": 6}, "key_dim=6 is invalid: expected an even number"),
        ({"mixer": "hgrn2", "mixer_options": {"short_convolution": 1}}, "short_convolution=1"),
        ({"mixer": "gated_delta_net", "mixer_options": {"method": "auto"}}, "method=auto"),
        ({"mixer": "mamba2", "block": "residual", "mlp_dim": 0}, "mlp_dim=0 is invalid"),
    ],
)
def test_what_a_mixer_cannot_have_is_rejected(fields, message):
    model = ModelConfig(num_heads=2, **fields)
    with pytest.raises(UserError, match=message):
        validate(Config(model=model, train=TrainConfig(steps=1)))
