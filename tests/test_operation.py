"""The recurrence, and the model around it, under the transformations of JAX.

Every method is compared with ``method="scan"``, which JAX differentiates, maps and lowers itself.
"""

import re
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from simplernn_jax.config import ModelConfig
from simplernn_jax.models import LanguageModel
from simplernn_jax.ops import gated_linear_recurrence, native

METHODS = [
    pytest.param(
        "fused",
        marks=pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
    ),
    "chunkwise",
]
B, T, H, K, V = 2, 5, 3, 2, 7
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}
IDS = jnp.asarray([[0, 0, 1, 1, 1], [4, 4, 4, 4, 2]], jnp.int32)


def draw():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(B, T, H, K)), jnp.float32) for _ in range(2))
    v = jnp.asarray(rng.normal(size=(B, T, H, V)), jnp.float32)
    log_gate = jnp.asarray(-rng.exponential(size=q.shape), jnp.float32)
    state = jnp.asarray(rng.normal(size=(B, H, K, V)), jnp.float32)
    return q, k, v, log_gate, state


def recurrence(method):
    def run(q, k, v, log_gate, state):
        return gated_linear_recurrence(
            q, k, v, log_gate, initial_state=state, segment_ids=IDS, method=method
        )

    return run


def loss(method):
    def total(*inputs):
        output, state = recurrence(method)(*inputs)
        return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.cos(state))

    return total


def forward_mode(method):
    tangents = tuple(jnp.cos(x) for x in draw())
    return lambda *inputs: jax.jvp(recurrence(method), inputs, tangents)[1]


def hessian_of_gates(method):
    return jax.hessian(loss(method), argnums=3)


def reverse_over_reverse(method):
    def penalty(*inputs):
        gradients = jax.grad(loss(method), (0, 1, 2, 3, 4))(*inputs)
        return sum(jnp.sum(jnp.square(x)) for x in gradients)

    return jax.grad(penalty, (0, 1, 2, 3, 4))


def reverse_over_forward(method):
    return jax.grad(lambda *inputs: jnp.sum(jnp.sin(forward_mode(method)(*inputs)[0])), (0, 3))


def forward_of_the_state(method):
    return jax.jacfwd(lambda *inputs: recurrence(method)(*inputs)[0], argnums=4)


def reverse_of_the_state(method):
    return jax.jacrev(lambda *inputs: recurrence(method)(*inputs)[0][:, -1], argnums=(0, 4))


def in_a_custom_jvp(method):
    @jax.custom_jvp
    def run(q):
        return recurrence(method)(q, *draw()[1:])[0]

    run.defjvp(
        lambda primals, tangents: (run(*primals), 2 * jax.jvp(run.fun, primals, tangents)[1])
    )
    return lambda *inputs: jax.grad(lambda q: jnp.sum(jnp.sin(run(q))))(inputs[0])


def rematerialized(method):
    policy = jax.checkpoint_policies.dots_saveable
    return jax.grad(jax.checkpoint(loss(method), policy=policy), (0, 3))


def in_a_scan(method):
    def three_times(*inputs):
        def step(state, _):
            return recurrence(method)(*inputs[:4], state)[1], None

        return jnp.sum(jnp.sin(jax.lax.scan(step, inputs[4], length=3)[0]))

    return jax.grad(three_times, (1, 3, 4))


def gradient_of_a_map(method):
    def total(q, k, v, log_gate, state):
        run = jax.vmap(recurrence(method), in_axes=(0, None, None, 1, None))
        output, states = run(jnp.stack([q, 2 * q]), k, v, jnp.stack([log_gate] * 2, 1), state)
        return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.cos(states))

    return jax.grad(total, (0, 1, 2, 3, 4))


def map_of_a_gradient(method):
    def run(*inputs):
        gradients = jax.vmap(jax.grad(loss(method), (0, 4)), in_axes=(0, None, None, None, 0))
        return gradients(jnp.stack([inputs[0]] * 3), *inputs[1:4], jnp.stack([inputs[4]] * 3))

    return run


FIRST_ORDER = [forward_mode, gradient_of_a_map, in_a_scan, map_of_a_gradient, rematerialized]
OTHERS = [
    forward_of_the_state,
    hessian_of_gates,
    in_a_custom_jvp,
    reverse_of_the_state,
    reverse_over_forward,
    reverse_over_reverse,
]


# Higher orders are those of the definition, whatever the method.
@pytest.mark.parametrize(
    ("transformed", "method"),
    [(f, m) for f in FIRST_ORDER for m in ("auto", "chunkwise")] + [(f, "auto") for f in OTHERS],
)
def test_transformations_equal_those_of_the_definition(transformed, method):
    inputs = draw()
    ours, expected = (jax.jit(transformed(m))(*inputs) for m in (method, "scan"))
    chex.assert_trees_all_close(ours, expected, **TOLERANCE)


def test_vmap_is_one_call():
    inputs = jax.tree.map(lambda x: jnp.stack([x, 2 * x, x / 3]), draw())
    run = jax.jit(jax.vmap(jax.grad(loss("auto"))))
    for name in (native.FORWARD, native.BACKWARD):
        calls = run.lower(*inputs).as_text().count(f"custom_call @{name}(")
        assert calls <= 1


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_each_platform_gets_its_own_form(method):
    traced = jax.jit(jax.grad(loss(method), (0, 3))).trace(*draw())
    for platform in ("cuda", "tpu"):
        assert "custom_call" not in traced.lower(lowering_platforms=(platform,)).as_text()
    here = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert (native.BACKWARD in here) == (
        method == "fused" or (native.can_call(jnp.float32) and method == "auto")
    )


@pytest.mark.parametrize("method", ["auto", *METHODS, "scan"])
def test_one_exported_program_for_all_platforms(method):
    inputs = draw()
    run = jax.jit(jax.value_and_grad(loss(method), (0, 1, 2, 3, 4)))
    exported = jax.export.export(run, platforms=("cpu", "cuda", "tpu"))(*inputs)
    chex.assert_trees_all_close(exported.call(*inputs), run(*inputs), **TOLERANCE)


def test_exported_for_any_batch_and_length():
    b, t = jax.export.symbolic_shape("b, t")
    q, k, v, log_gate, _ = draw()
    shapes = [jax.ShapeDtypeStruct((b, t, *x.shape[2:]), x.dtype) for x in (q, k, v, log_gate)]

    def total(q, k, v, log_gate):
        return jnp.sum(jnp.sin(gated_linear_recurrence(q, k, v, log_gate)[0]))

    run = jax.jit(jax.value_and_grad(total, (0, 3)))
    exported = jax.export.export(run, platforms=("cpu", "cuda"))(*shapes)
    for inputs in ((q, k, v, log_gate), [x[:1, :3] for x in (q, k, v, log_gate)]):
        chex.assert_trees_all_close(exported.call(*inputs), run(*inputs), **TOLERANCE)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request):
    config = ModelConfig(
        vocab_size=11,
        hidden_dim=32,
        key_dim=34,
        value_dim=38,
        num_heads=1,
        mlp_dim=37,
        num_layers=1,
        precision=request.param,
    )
    return nnx.split(LanguageModel(config, rngs=nnx.Rngs(0)), nnx.Param)


def model_loss(graph):
    # As many tokens as it takes until C functions pay.
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 256)), jnp.int32)

    def total(params):
        logits, state = nnx.merge(graph, params)(tokens)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0]), state

    return total


def test_the_model_in_forward_mode_and_twice(model):
    graph, params = model
    total = model_loss(graph)
    direction = jax.tree.map(jnp.ones_like, params)

    @jax.jit
    def derivatives(params):
        gradient = jax.grad(lambda params: total(params)[0])
        slope = jax.jvp(lambda params: total(params)[0], (params,), (direction,))[1]
        forward = jax.jvp(gradient, (params,), (direction,))[1]

        def along(params):
            return sum(map(jnp.sum, jax.tree.leaves(gradient(params))))

        return slope, along(params), forward, jax.grad(along)(params)

    slope, along, forward, reverse = derivatives(params)
    # bfloat16 is rounded in other places forward than in reverse.
    tolerance = 3e-2 if is_low(graph) else 1e-4
    chex.assert_trees_all_close(slope, along, rtol=tolerance)
    largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(reverse))
    chex.assert_trees_all_close(forward, reverse, rtol=0, atol=tolerance * largest)


def is_low(graph):
    return "bfloat16" in str(graph)


@pytest.mark.parametrize("devices", [1, 8])
def test_the_model_exported_for_all_platforms(model, monkeypatch, devices):
    monkeypatch.setattr(jax, "device_count", lambda: devices)  # on one, layouts are constrained
    graph, params = model
    b, t = jax.export.symbolic_shape("b, t")

    def run(params, tokens):
        return nnx.merge(graph, params)(tokens)

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    exported = jax.export.export(jax.jit(run), platforms=("cpu", "cuda", "tpu"))(
        shapes, jax.ShapeDtypeStruct((b, t), jnp.int32)
    )
    assert not re.search(r"custom_call @(simplernn|LayoutConstraint)", exported.mlir_module())
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 11, (2, 256)), jnp.int32)
    chex.assert_trees_all_close(
        exported.call(params, tokens),
        jax.jit(run)(params, tokens),
        rtol=0,
        atol=0.05 if is_low(graph) else 1e-4,
    )


def test_without_compilation():
    inputs = draw()
    with jax.disable_jit():
        ours = jax.grad(loss("auto"), (0, 3))(*inputs)
    chex.assert_trees_all_close(ours, jax.grad(loss("scan"), (0, 3))(*inputs), **TOLERANCE)
