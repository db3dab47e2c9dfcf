"""The map of softmax attention against its definition written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simplernn_jax.analysis.softmax_map import seen_tokens, softmax_map
from simplernn_jax.models.attention import Attention

LENGTH, HEADS, KEYS, CONTEXT, PAST = 11, 3, 2, 5, 7


@pytest.mark.parametrize("segments", [None, [0] * 4 + [1] * 7])
def test_equals_the_definition(segments):
    """Each token sees the last ones of its segment: their products with it turn with the distance.

    One pair of channels turns by one radian a token.
    """
    attention = Attention(7, HEADS * KEYS, HEADS, 7, HEADS, context=CONTEXT, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(1, PAST + LENGTH, 7))
    x = jnp.asarray(x, jnp.float32)
    _, cache = attention(x[:, :PAST])
    ids = None if segments is None else np.asarray(segments, np.int32)[None]

    @jax.jit
    def weights_of(attention, x, cache):
        projected, _ = attention.projections(x)
        return softmax_map(seen_tokens(attention, projected, cache, ids))

    weights = np.asarray(weights_of(attention, x[:, PAST:], cache))[0]
    (q, k, _), _ = attention.projections(x)
    q, k = (np.asarray(part[0], np.float64) for part in (q, k))  # [PAST + LENGTH, H, K]
    segment = np.concatenate([np.zeros(PAST), segments or np.zeros(LENGTH)])
    q, k = q[..., 0] + 1j * q[..., 1], k[..., 0] + 1j * k[..., 1]
    for t in range(PAST, PAST + LENGTH):
        seen = [j for j in range(t - CONTEXT + 1, t + 1) if segment[j] == segment[t]]
        scores = [np.real(np.conj(q[t]) * k[j] * np.exp(1j * (j - t))) / KEYS**0.5 for j in seen]
        expected = np.exp(scores) / np.exp(scores).sum(axis=0)
        given = np.zeros((HEADS, CONTEXT + LENGTH))
        for j, row in zip(seen, expected, strict=True):
            # What stands before the stretch lies in slot j modulo the context.
            given[:, j % CONTEXT if j < PAST else CONTEXT + j - PAST] = row
        np.testing.assert_allclose(weights[:, t - PAST], given, rtol=1e-5, atol=1e-7)
