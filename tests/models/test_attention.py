"""Attention against its definition in float64, its cache, its segments and its memory."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from references import run_in_pieces, without_oldest

from simplernn_jax.models import Attention
from simplernn_jax.ops import attention as operator
from simplernn_jax.ops.attention import apply_rope

BATCH, LENGTH = 2, 29
WIDE_KEYS = {"hidden_dim": 5, "key_dim": 18, "value_dim": 12, "output_dim": 7, "num_heads": 3}
WIDE_VALUES = {"hidden_dim": 5, "key_dim": 6, "value_dim": 21, "output_dim": 7, "num_heads": 3}

SEGMENTS = {
    "one": np.zeros((BATCH, LENGTH), np.int32),
    # An id that occurs again is another segment; boundaries differ between the sequences.
    "several": np.stack([[7] * 3 + [8] + [7] * 14 + [9] * 11, [0] * 11 + [1] + [2] * 17]),
    "every token": np.tile(np.arange(LENGTH), (BATCH, 1)),
}


@pytest.fixture
def _x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that short sequences take every branch."""
    monkeypatch.setattr(operator, "QUERY_BLOCK", 4)


def jitted():
    """Jit the call of a layer, with a new cache: programs depend on the size of blocks."""
    return nnx.jit(lambda layer, x, state=None, segments=None: layer(x, state, segments))


call = jitted()


def make(sizes=WIDE_KEYS, context=6, dtype=jnp.float32, **options):
    layer = Attention(**sizes, context=context, rngs=nnx.Rngs(0), dtype=dtype, **options)
    draw = np.random.default_rng(0)
    for _, leaf in nnx.to_flat_state(nnx.state(layer, nnx.Param)):
        noise = 0.3 * draw.normal(size=leaf.shape)  # on biases and scales, too
        leaf.set_value(jnp.asarray(np.asarray(leaf[...]) + noise, jnp.float32))
    return layer


def inputs(length=LENGTH, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, length, 5)), dtype)


def visible(segment_ids, context):
    """Mask ``[B, T, S]`` of the tokens that each one sees."""
    time = np.arange(LENGTH)
    distance = time[:, None] - time
    segment = np.cumsum(np.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0, axis=1)
    same = segment[:, :, None] == segment[:, None]
    return same & ((distance >= 0) & (distance < context))[None]


def by_definition(layer, x, is_visible):
    """The equations in x's dtype with full scores; rotations are complex multiplications."""

    def linear(x, projection):
        kernel, bias = (
            param[...].astype(x.dtype) for param in (projection.kernel, projection.bias)
        )
        return x @ kernel + bias[None, None]

    q, k, v = (
        linear(x, projection).reshape(*x.shape[:2], layer.num_heads, -1)
        for projection in (layer.query_proj, layer.key_proj, layer.value_proj)
    )
    half = q.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * 10_000.0 ** -(np.arange(half) / half)[None]
    turn = np.exp(1j * angles)[None, :, None]

    def rotated(y):
        y = jax.lax.complex(y[..., :half], y[..., half:]) * turn
        return jnp.concatenate([y.real, y.imag], axis=-1)

    scores = jnp.einsum("bthk,bshk->bhts", rotated(q), rotated(k)) / q.shape[-1] ** 0.5
    scores = jnp.where(is_visible[:, None], scores, -jnp.inf)
    y = jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(scores, axis=-1), v)
    if layer.output_norm:
        y = y / jnp.sqrt(jnp.mean(y**2, -1, keepdims=True) + 1e-6)
    y = y.reshape(*x.shape[:2], -1)
    if layer.output_gate_proj is not None:
        y = y * jax.nn.silu(linear(x, layer.output_gate_proj))
    return linear(y, layer.out_proj)


def with_gradients(function, layer):
    """Jit (x, segments) to the output, and gradients of a weighted sum of it."""
    graph, params = nnx.split(layer)
    weights = np.random.default_rng(5).normal(size=(BATCH, LENGTH, layer.out_proj.out_features))

    def total(params, x, segments):
        y = function(nnx.merge(graph, params), x, segments)
        return jnp.sum(y.astype(weights.dtype) * weights), y

    results = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))

    def output_and_gradients(x, segments):
        (_, y), gradients = results(params, x, segments)
        return y, gradients

    return output_and_gradients


@pytest.mark.usefixtures("_x64", "small_blocks")
@pytest.mark.parametrize(
    ("sizes", "context", "options", "dtype", "limit"),
    [
        (WIDE_KEYS, 6, {}, jnp.float64, 3e-7),
        (WIDE_VALUES, 100, {"output_norm": True, "output_gate": True}, jnp.float32, 1e-5),
    ],
    ids=["K > V, sliding, float64", "K < V, all"],
)
def test_equals_the_definition(sizes, context, options, dtype, limit):
    """In float64, the resolution of angles (2^-32 turns) limits the accuracy. Key biases change all
    scores of a query nearly alike: their gradients are small differences of large sums."""
    layer = make(sizes, context, dtype, **options)
    definition = with_gradients(by_definition, layer)
    ours = with_gradients(lambda layer, x, segments: layer(x, None, segments)[0], layer)
    for segments in SEGMENTS.values():
        expected = definition(inputs(dtype=jnp.float64), visible(segments, context))
        found = ours(inputs(dtype=dtype), segments)
        chex.assert_trees_all_close(found, expected, rtol=limit, atol=limit)


@pytest.mark.oldest_python
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("lengths", "context"), [((1,) * 29, 1), ((0, 3, 1, 12, 13), 6)])
def test_pieces_equal_the_whole_sequence(lengths, context):
    layer, call = make(context=context), jitted()
    segment_ids = jnp.asarray(SEGMENTS["several"])
    whole, end = call(layer, inputs(), None, segment_ids)
    pieces, state = run_in_pieces(call, layer, inputs(), segment_ids, lengths)
    chex.assert_trees_all_close(pieces, whole, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, end)
    chex.assert_trees_all_close(without_oldest(state), without_oldest(end), rtol=1e-5, atol=1e-5)


def test_state_is_of_the_last_segment():
    layer = make(context=5)
    _, state = call(layer, inputs(), None, jnp.asarray(SEGMENTS["several"]))
    chex.assert_trees_all_equal(state.length, jnp.asarray([11, 17], jnp.int32))
    # A segment shorter than the cache: earlier slots are zero.
    late = jnp.asarray(np.tile(np.arange(LENGTH) >= 27, (BATCH, 1)).astype(np.int32))
    _, state = call(layer, inputs(), None, late)
    assert state.length.tolist() == [2, 2]
    for cached in (state.keys, state.values):
        size = np.abs(cached).max(axis=(1, 3))
        assert (size[:, :2] > 0).all()
        assert (size[:, 2:] == 0).all()


def test_rope_depends_on_the_distance_at_any_position():
    q, k = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 1, 1, 32)), jnp.float32)

    def dot(position, distance):
        at = [jnp.full((1, 1), p, jnp.int32) for p in (position, position - distance)]
        return float(jnp.sum(apply_rope(q, at[0]) * apply_rope(k, at[1])))

    for distance in (0, 1, 1000):
        near = dot(distance, distance)
        for position in (10**5, 10**9 + 7, 2**31 - 1):
            assert dot(position, distance) == pytest.approx(near, abs=1e-5)
    assert abs(dot(5, 1) - dot(5, 2)) > 0.1
    with jax.enable_x64(True):  # int64 positions are modulo 2^32 too
        long, short = (apply_rope(q, jnp.full((1, 1), p, jnp.int64)) for p in (2**33 + 5, 5))
    np.testing.assert_array_equal(long, short)


def temporary_bytes(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_the_gradient_is_linear_in_tokens():
    layer = make(context=64)

    def total(x):
        return jnp.sum(layer(x)[0])

    sizes = [temporary_bytes(jax.grad(total), (1, length, 5)) for length in (16_384, 65_536)]
    assert sizes[1] < 6 * sizes[0]
    assert sizes[1] < 65_536**2 / 25  # one percent of the scores of one head
