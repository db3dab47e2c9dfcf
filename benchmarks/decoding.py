"""Generation with the `base` model: time per token, beside two baselines.

The baselines are the matrix-vector products of one token alone, and recomputing the prefix, as the
PyTorch project does, here as one parallel forward pass over all of it (a stronger baseline than
its loop over time).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import tables
from benchmarks.measure import Call, Effort, Times, alternate, block_ratio, median
from benchmarks.train_steps import load_config
from simplernn_jax.config import ModelConfig
from simplernn_jax.inference import generate
from simplernn_jax.models import LanguageModel

CONTEXTS = {"short": 100, "middle": 4096, "long": 100_000}
"""Tokens before those that are generated; the prefix of ``middle`` is also recomputed."""
STREAMS = 32
NEW_TOKENS = 256
PREFILL = 16_384

RATIOS = (
    ("long context / short", "long", "short"),
    ("recompute / decode, middle context", "recompute", "middle"),
    ("decode / matrix-vector products", "short", "matmuls"),
    ("one stream / many, per token", "short", "streams"),
    ("decode / prefill, per token", "short", "prefill"),
    ("streaming / not", "streaming", "short"),
)
"""Heading, and the candidates whose times per token are compared."""


def run(effort: Effort) -> dict[str, Any]:
    """Measure and print."""
    config = load_config("base", batch=1, length=CONTEXTS["middle"])
    results = compare(config.model, effort)
    tables.show("decode: base", results["candidates"])
    tables.show("decode: ratios, medians over blocks", results["ratios"])
    return results


def compare(
    config: ModelConfig,
    effort: Effort,
    *,
    contexts: Mapping[str, int] = CONTEXTS,
    prefill: int = PREFILL,
    streams: int = STREAMS,
    new_tokens: int = NEW_TOKENS,
) -> dict[str, Any]:
    """Time per token of every candidate, for a model with random parameters.

    Args:
      config: of the model.
      effort: number of repetitions.
      contexts: as `CONTEXTS`.
      prefill: tokens of the timed prompt.
      streams: batch size of one candidate.
      new_tokens: generated per sequence and call.

    Returns:
      ``candidates``, with many streams per token of any stream, and ``ratios``.
    """
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    prompt = random_tokens(config, 1, prefill)
    first = random_tokens(config, 1, contexts["short"])
    many = random_tokens(config, streams, contexts["short"])
    calls: dict[str, tuple[Call, int]] = {
        name: (decode_call(model, random_tokens(config, 1, length), new_tokens), new_tokens)
        for name, length in contexts.items()
    }
    calls |= {
        "recompute": (recompute_call(model, random_tokens(config, 1, contexts["middle"])), 1),
        "matmuls": (matrix_vector_products(model, new_tokens), new_tokens),
        "streams": (decode_call(model, many, new_tokens), streams * new_tokens),
        "prefill": (lambda: generate(model, prompt, max_new_tokens=0).state, prefill),
        "streaming": (decode_call(model, first, new_tokens, lambda _: None), new_tokens),
    }
    times = alternate({name: call for name, (call, _) in calls.items()}, effort)
    per_token: dict[str, Times] = {
        name: [[seconds / count for seconds in block] for block in times[name]]
        for name, (_, count) in calls.items()
    }
    details = {name: f"context {length:,}" for name, length in contexts.items()}
    details |= {"recompute": f"prefix of {contexts['middle']:,}", "prefill": f"{prefill:,} tokens"}
    details |= {"streams": f"{streams} sequences", "streaming": details["short"]}
    candidates = [
        {
            "candidate": name,
            "of": details.get(name, ""),
            "us/token": 1e6 * median(blocks),
            "tokens/s": 1 / median(blocks),
        }
        for name, blocks in per_token.items()
    ]
    ratios = [
        {"ratio": name, "value": block_ratio(per_token[a], per_token[b])} for name, a, b in RATIOS
    ]
    return {"candidates": candidates, "ratios": ratios}


def random_tokens(config: ModelConfig, batch: int, length: int) -> np.ndarray:
    """``[batch, length]`` random token ids."""
    return np.random.default_rng(0).integers(0, config.vocab_size, (batch, length), np.int32)


def recompute_call(model: LanguageModel, tokens: np.ndarray) -> Call:
    """The next token after `tokens` ``[1, T]`` from a forward pass over all of them."""
    graph, arrays = nnx.split(model)

    @jax.jit
    def next_token(arrays: Any, tokens: jax.Array) -> jax.Array:
        logits, _ = nnx.merge(graph, arrays)(tokens)
        return jnp.argmax(logits[:, -1], axis=-1)

    return lambda: next_token(arrays, tokens)


def decode_call(
    model: LanguageModel,
    prompt: np.ndarray,
    new_tokens: int,
    on_tokens: Callable[[list[np.ndarray]], None] | None = None,
) -> Call:
    """Generation from the end of `prompt`, which is prefilled here, once."""
    state = generate(model, prompt, max_new_tokens=0).state
    return lambda: (
        generate(model, state=state, max_new_tokens=new_tokens, on_tokens=on_tokens).state
    )


def matrix_vector_products(model: LanguageModel, num_tokens: int) -> Call:
    """Every matrix of the model times a vector, one after another, `num_tokens` times.

    Each product takes the newest vector of its width, so that none can be removed, hoisted or
    fused with another; the tied embedding counts as the head. Returns that vector, ``[D]``.
    """
    width = model.config.hidden_dim
    linears = [part for _, part in nnx.iter_graph(model) if isinstance(part, nnx.Linear)]
    matrices = [linear.kernel[...] for linear in linears if linear is not model.head]
    tied = model.embedding.embedding[...].T
    head = tied if model.head is None else model.head.kernel[...]

    @jax.jit
    def all_products(matrices: list[jax.Array], head: jax.Array, start: jax.Array) -> jax.Array:
        def one_token(_: jax.Array, x: jax.Array) -> jax.Array:
            newest = {width: x}
            for matrix in matrices:
                newest[matrix.shape[1]] = newest[matrix.shape[0]] @ matrix
            x = newest[width]
            x = x + jnp.max(x @ head)
            return x * jax.lax.rsqrt(jnp.mean(x**2))  # denormal numbers would slow it down

        return jax.lax.fori_loop(0, num_tokens, one_token, start)

    start = jnp.ones(width)
    return lambda: all_products(matrices, head, start)
