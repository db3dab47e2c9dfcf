"""Random inputs, references and comparisons that tests of operations and layers share."""

import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simplernn_jax.config import ModelConfig
from simplernn_jax.models import KVCache, LanguageModel
from simplernn_jax.ops import gated_linear_recurrence
from simplernn_jax.ops.rms_norm import EPSILON
from simplernn_jax.ops.segments import reset_state

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
FAST_METHODS = [pytest.param("fused", marks=needs_compiler), "chunkwise"]
NATIVE = [False, pytest.param(True, marks=needs_compiler)]

RESULTS = ("output", "final_state", "d_q", "d_k", "d_v", "d_log_gate", "d_initial_state")
"""Names of what `value_and_gradients` returns for the recurrence."""


def draw_recurrence(
    batch, length, heads, key_dim, value_dim, dtype=np.float32, log_gates=None, seed=0
):
    """Draw (q, k, v, log_gate, initial state), and cotangents of the output and the state."""
    rng = np.random.default_rng([seed, length, heads])
    q = rng.normal(size=(batch, length, heads, key_dim))
    k = 1 / (1 + np.exp(-rng.normal(size=q.shape)))
    v = rng.normal(size=(batch, length, heads, value_dim))
    state = rng.normal(size=(batch, heads, key_dim, value_dim))
    log_gate = log_gates(rng, q.shape) if log_gates else -rng.exponential(size=q.shape)
    inputs = (q, k, v, log_gate, state)
    cotangents = (rng.normal(size=v.shape), rng.normal(size=state.shape))
    return tuple(tuple(jnp.asarray(x, dtype) for x in arrays) for arrays in (inputs, cotangents))


def draw_model(precision, batch, length, **sizes):
    """Draw a small language model and tokens: a function (params, tokens), and both."""
    sizes = {"num_layers": 2, "hidden_dim": 32, "key_dim": 32, "value_dim": 32} | sizes
    config = ModelConfig(vocab_size=11, precision=precision, **sizes)
    graph, params = nnx.split(LanguageModel(config, rngs=nnx.Rngs(0)), nnx.Param)
    tokens = np.random.default_rng(0).integers(0, 11, (batch, length))
    return (
        lambda params, tokens: nnx.merge(graph, params)(tokens),
        params,
        jnp.asarray(tokens, jnp.int32),
    )


def first_id_loss(logits):
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0])


def draw_shard_boundaries(length, shard):
    """Segment ids of 10 sequences with boundaries at, beside and inside shards of some length."""
    time = np.arange(length)
    ids = [
        0 * time,
        time // shard,
        time // (3 * shard),
        (time + 1) // shard,
        (time + shard - 1) // shard,
        time // (length - 1),
        time,
        # An id that occurs again is another segment.
        (time // 4) % 2,
        (time // shard) % 2,
        np.cumsum(np.random.default_rng(3).random(length) < 0.1),
    ]
    return np.stack(ids).astype(np.int32)


def recurrence(q, k, v, log_gate, state=None, segment_ids=None, **options):
    """Call `gated_linear_recurrence` with positional arguments."""
    return gated_linear_recurrence(
        q, k, v, log_gate, initial_state=state, segment_ids=segment_ids, **options
    )


def recurrence_loss(*inputs, **options):
    """Compute a scalar that depends on all results of `recurrence`, and these."""
    output, state = recurrence(*inputs, **options)
    return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.cos(state)), (output, state)


def value_and_gradients(function, inputs, cotangents):
    """Compute the results of a function, and the gradients of its inputs."""
    results, pullback = jax.vjp(function, *inputs)
    cotangents = (c.astype(r.dtype) for c, r in zip(cotangents, results, strict=True))
    return *results, *pullback(tuple(cotangents))


def relative_rms(actual, expected):
    """RMS(actual - expected) / RMS(expected); if that is zero, the largest entry."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(actual).all()
    scale = np.sqrt(np.mean(expected**2))
    return np.sqrt(np.mean((actual - expected) ** 2)) / scale if scale else np.abs(actual).max()


def assert_same_bytes(actual, expected):
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def assert_accurate(actual, expected, limits):
    """Check the `RESULTS` of the recurrence against those in float64."""
    for name, ours, reference in zip(RESULTS, actual, expected, strict=True):
        if np.sqrt(np.mean(np.asarray(reference) ** 2)) < 1e-7:
            # Only rounding: gates of 1e-12 leave nothing of the state before them, and resets
            # nothing of their gates' gradients.
            assert np.sqrt(np.mean(np.asarray(ours, np.float64) ** 2)) < 1e-5, name
            continue
        assert relative_rms(ours, reference) <= limits.get(name, limits["all"]), name


def convolve_by_loops(x, weights, recent, starts):
    """Compute `rms_norm_convolution` in NumPy: a sum over lags from the start of the segment."""
    normalized = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPSILON)
    inputs = np.concatenate([recent, normalized], axis=1)
    y, past = np.zeros(x.shape), recent.shape[1]
    for b, t in np.ndindex(*x.shape[:2]):
        for i in range(weights.shape[0]):
            if i and starts is not None and t - i + 1 >= 0 and starts[b, t - i + 1]:
                break
            y[b, t] += weights[i] * inputs[b, past + t - i]
    return y, inputs[:, x.shape[1] :]


def run_in_pieces(call, layer, x, segment_ids, lengths):
    """Call a layer on consecutive pieces of `x`, from its initial state."""
    state, outputs, start = layer.initial_state(x.shape[0]), [], 0
    x, segment_ids = np.asarray(x), np.asarray(segment_ids)  # slices compile nothing
    for length in lengths:
        piece = slice(start, start + length)
        if start and length:
            # The caller resets at a boundary between two pieces, as with the recurrence.
            begins = segment_ids[:, start] != segment_ids[:, start - 1]
            state = reset_state(state, jnp.asarray(begins))
        y, state = call(layer, jnp.asarray(x[:, piece]), state, jnp.asarray(segment_ids[:, piece]))
        outputs.append(np.asarray(y))
        start += length
    return np.concatenate(outputs, axis=1), state


def without_oldest(state):
    """Zero the slot of each KV cache that the next token overwrites, which no query reads."""

    def clear(leaf):
        if not isinstance(leaf, KVCache):
            return leaf
        sequences, slots = jnp.arange(leaf.length.size), leaf.length % leaf.keys.shape[2]
        keys, values = (cached.at[sequences, :, slots].set(0) for cached in leaf[:2])
        return KVCache(keys, values, leaf.length)

    return jax.tree.map(clear, state, is_leaf=lambda leaf: isinstance(leaf, KVCache))
