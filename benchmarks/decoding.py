"""Writing with the `base` model: the cost of a token, and of what could be done instead.

Baselines: the matrix-vector products of one token alone, without anything between them; and
recomputing the prefix, as the PyTorch project does, here as one parallel forward pass of ours over
all of it (a stronger baseline than its loop over time).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import machine, tables
from benchmarks.interleave import Call, Effort, Times, alternate, block_ratio, median
from benchmarks.jax_steps import load_config
from simplernn_jax.config import ModelConfig
from simplernn_jax.inference import generate
from simplernn_jax.models import LanguageModel

SHORT, MIDDLE, LONG = 100, 4096, 100_000
"""Contexts, in tokens."""
STREAMS = 32
NEW_TOKENS = 256
PREFILL = 16_384


def run(effort: Effort) -> dict[str, Any]:
    """Measures and prints everything."""
    ceilings = machine.measure_ceilings(effort)
    config = load_config("base", batch=1, length=MIDDLE)
    results = compare(config.model, effort)
    _show(results)
    print(machine.say_ceilings(ceilings))
    return {"ceilings": ceilings, **results}


def compare(
    config: ModelConfig,
    effort: Effort,
    *,
    contexts: tuple[int, int, int] = (SHORT, MIDDLE, LONG),
    prefill: int = PREFILL,
    streams: int = STREAMS,
    new_tokens: int = NEW_TOKENS,
) -> dict[str, Any]:
    """Time per token of every way to come by one, for a model with random parameters.

    Args:
      config: of the model.
      effort: how often.
      contexts: tokens read before writing: few, as many as are recomputed, many.
      prefill: tokens of the prompt whose reading is timed.
      streams: rows that are written together.
      new_tokens: written per row and call.

    Returns:
      ``us_per_token`` of every candidate (with many streams per token of any stream), and
      ``ratios``, each a median over blocks.
    """
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    short, middle, long = (
        writing(model, prompts(config, 1, length), new_tokens) for length in contexts
    )
    prompt = prompts(config, 1, prefill)
    calls: dict[str, tuple[Call, int]] = {
        "short": (short, new_tokens),
        "long": (long, new_tokens),
        "middle": (middle, new_tokens),
        "recompute": (recompute(model, prompts(config, 1, contexts[1])), 1),
        "products": (matrix_vector_products(model, new_tokens), new_tokens),
        "streams": (
            writing(model, prompts(config, streams, contexts[0]), new_tokens),
            streams * new_tokens,
        ),
        "prefill": (lambda: generate(model, prompt, max_new_tokens=0).state, prefill),
        "streaming": (
            writing(model, prompts(config, 1, contexts[0]), new_tokens, lambda _: None),
            new_tokens,
        ),
    }
    times = alternate({name: call for name, (call, _) in calls.items()}, effort)
    per_token = {
        name: [[seconds / count for seconds in block] for block in times[name]]
        for name, (_, count) in calls.items()
    }
    return {
        "contexts": contexts,
        "prefill": prefill,
        "streams": streams,
        "us_per_token": {name: 1e6 * median(blocks) for name, blocks in per_token.items()},
        "ratios": ratios(per_token),
    }


def ratios(per_token: Mapping[str, Times]) -> dict[str, float]:
    """What is promised of the decoder, from the times per token of every candidate."""
    pairs = {
        "long_context_to_short": ("long", "short"),
        "recompute_to_ours": ("recompute", "middle"),
        "ours_to_products": ("short", "products"),
        "one_stream_to_many": ("short", "streams"),
        "writing_to_prefill": ("short", "prefill"),
        "streaming_to_not": ("streaming", "short"),
    }
    return {name: block_ratio(per_token[a], per_token[b]) for name, (a, b) in pairs.items()}


def prompts(config: ModelConfig, rows: int, length: int) -> np.ndarray:
    """``[rows, length]`` random token ids."""
    return np.random.default_rng(0).integers(0, config.vocab_size, (rows, length), np.int32)


def recompute(model: LanguageModel, tokens: np.ndarray) -> Call:
    """The next token of ``tokens`` [1, T] from all of them, nothing kept from before."""
    graph, arrays = nnx.split(model)

    @jax.jit
    def next_token(arrays: Any, tokens: jax.Array) -> jax.Array:
        logits, _ = nnx.merge(graph, arrays)(tokens)
        return jnp.argmax(logits[:, -1], axis=-1)

    return lambda: next_token(arrays, tokens)


def matrix_vector_products(model: LanguageModel, num_tokens: int) -> Call:
    """Every matrix of the model times a vector, one after another, `num_tokens` times.

    Each product reads the newest vector of its width, so that none can be left out, moved or
    joined with another; the tied embedding counts as the head. Gives that vector, ``[D]``.
    """
    width = model.config.hidden_dim
    linears = [part for _, part in nnx.iter_graph(model) if isinstance(part, nnx.Linear)]
    matrices = [linear.kernel[...] for linear in linears if linear is not model.head]
    head = _table(model).T if model.head is None else model.head.kernel[...]

    @jax.jit
    def all_products(matrices: list[jax.Array], head: jax.Array, start: jax.Array) -> jax.Array:
        def one_token(_: jax.Array, x: jax.Array) -> jax.Array:
            newest = {width: x}
            for matrix in matrices:
                newest[matrix.shape[1]] = newest[matrix.shape[0]] @ matrix
            x = newest[width]
            x = x + jnp.max(x @ head)
            return x * jax.lax.rsqrt(jnp.mean(x**2))  # or it would vanish, and slow down

        return jax.lax.fori_loop(0, num_tokens, one_token, start)

    start = jnp.ones(width)
    return lambda: all_products(matrices, head, start)


def _table(model: LanguageModel) -> jax.Array:
    return model.embedding.embedding[...]


def writing(
    model: LanguageModel,
    prompt: np.ndarray,
    new_tokens: int,
    on_tokens: Callable[[list[np.ndarray]], None] | None = None,
) -> Call:
    """Writes on from the end of `prompt`, which is read here, once."""
    state = generate(model, prompt, max_new_tokens=0).state
    return lambda: (
        generate(model, state=state, max_new_tokens=new_tokens, on_tokens=on_tokens).state
    )


def _show(results: Mapping[str, Any]) -> None:
    short, middle, long = (f"{context:,}" for context in results["contexts"])
    streams = results["streams"]
    lines = [
        ("writing, context " + short, "short", "", ""),
        ("writing, context " + long, "long", "long_context_to_short", f"of context {short}"),
        ("writing, context " + middle, "middle", "", ""),
        (f"recomputing a prefix of {middle}", "recompute", "recompute_to_ours", "of writing there"),
        ("matrix-vector products alone", "products", "", ""),
        ("writing, one stream", "short", "ours_to_products", "of the products"),
        (f"writing, {streams} streams", "streams", "one_stream_to_many", "tokens/s of one stream"),
        (
            f"reading a prompt of {results['prefill']:,}",
            "prefill",
            "writing_to_prefill",
            "faster than writing",
        ),
        ("streaming", "streaming", "streaming_to_not", "of not streaming"),
    ]
    per_token, all_ratios = results["us_per_token"], results["ratios"]
    rows = [
        [
            what,
            tables.number(per_token[name], 2),
            tables.number(1e6 / per_token[name]),
            tables.times(all_ratios.get(ratio)) if ratio else "",
            against,
        ]
        for what, name, ratio, against in lines
    ]
    tables.show("decode: base", ["what", "us/token", "tokens/s", "ratio", ""], rows)
