"""Run one compiled step with the compilation cache, for test_compilation_cache.py."""

import functools
import warnings

import jax
import jax.monitoring
import jax.numpy as jnp

from simplernn_jax.cli.compilation_cache import use_compilation_cache

warnings.simplefilter("error")

hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None
)
use_compilation_cache()


@functools.partial(jax.jit, donate_argnums=0)
def step(state, x):
    return jnp.tanh(state @ x + jnp.sin(state)), state.sum()


state, total = step(jnp.linspace(0.0, 1.0, 49).reshape(7, 7), jnp.full((7, 7), 0.3))
print(jax.device_get(state).tobytes().hex(), total, len(hits))
