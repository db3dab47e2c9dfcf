"""Generation with the `base` model: time per token, compared with a pass over the whole prefix.

That pass is parallel; the PyTorch project recomputes the prefix in a loop over time. Then the same
with quantized weights at several sizes, compared with the rate at which the machine reads that many
bytes.
"""

import functools
import itertools
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplernn_jax import load_model, project
from simplernn_jax.config import ModelConfig
from simplernn_jax.data.token_store import TokenizedCorpus
from simplernn_jax.errors import UserError
from simplernn_jax.inference import generate, quantize_model
from simplernn_jax.inference.decoder_weights import QUANTIZATIONS
from simplernn_jax.inference.engine import Engine
from simplernn_jax.models import LanguageModel

from .measure import Call, Effort, alternate, block_ratio, median
from .tables import Row, Table
from .train_steps import document_texts, load_config

CONTEXTS = {"short": 100, "middle": 4096, "long": 100_000}
"""Tokens before those that are generated; the prefix of ``middle`` is also recomputed."""
STREAMS, NEW_TOKENS, PREFILL = 32, 1024, 16_384
LOOKUP_PROMPT, LOOKUP_TOKENS = 2000, 512
"""Characters of a prompt of `run_lookup`, and new tokens after it."""
FORMATS_OF = ("base", "small", "gpt2_size")
"""Configurations of the tables of formats: 1 M, 25 M and 124 M parameters."""
WEIGHTS_PER_CALL = 1 << 33
"""Weights that a timed call of them multiplies; starting one takes as long as four tokens."""


def run(effort: Effort) -> Iterator[Table]:
    """Tables of times."""
    config = load_config("base", 1, CONTEXTS["middle"]).model
    yield Table("decode: base", compare(config, effort))
    for name in FORMATS_OF:
        config = load_config(name, 1, CONTEXTS["short"], precision="float32").model
        yield Table(f"decode: formats of the weights, {name}", compare_formats(config, effort))


def compare(config: ModelConfig, effort: Effort) -> list[Row]:
    """Candidates, with their time per token of a random model, also relative to ``short``."""
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    short, middle, _ = CONTEXTS.values()
    prefix, prompt = (random_tokens(config, 1, length) for length in (middle, PREFILL))
    many = decode_call(model, short, NEW_TOKENS, streams=STREAMS)
    streamed = decode_call(model, short, NEW_TOKENS, on_tokens=lambda _: None)
    candidates: dict[str, tuple[str, Call, int]] = {
        name: (f"context {length:,}", decode_call(model, length, NEW_TOKENS), NEW_TOKENS)
        for name, length in CONTEXTS.items()
    } | {
        "recompute": (f"prefix of {middle:,}", recompute_call(model, prefix), 1),
        "streams": (f"{STREAMS} sequences", many, STREAMS * NEW_TOKENS),
        "prefill": (f"{PREFILL:,} tokens", lambda: state_after(model, prompt), PREFILL),
        "streaming": (f"context {short:,}", streamed, NEW_TOKENS),
    }
    times = alternate({name: call for name, (_, call, _) in candidates.items()}, effort)
    rows: list[Row] = []
    for name, (what, _, count) in candidates.items():
        seconds = median(times[name]) / count
        row = {"candidate": name, "of": what, "us/token": 1e6 * seconds, "tokens/s": 1 / seconds}
        relative = block_ratio(times[name], times["short"]) * NEW_TOKENS / count
        rows.append(row | {"time / short": relative})
    return rows


def compare_formats(config: ModelConfig, effort: Effort) -> list[Row]:
    """Decoding of one sequence by a random model, per format of its weights.

    The limit is the time to read the weights once, measured in the same blocks.
    """
    original = LanguageModel(config, rngs=nnx.Rngs(0))
    engine = Engine(original)
    if not engine.is_native:
        return []  # there is but one format
    num_weights = sum(x.size for x in engine.parameters)
    num_tokens = max(8, WEIGHTS_PER_CALL // num_weights)
    rows: list[Row] = []
    for quantize in QUANTIZATIONS:
        model = quantize_model(original, quantize)
        # Of the embedding one column is read; if it is tied, it is also the head.
        weights = Engine(model).weights._replace(embedding=None)
        num_bytes = sum(x.nbytes for x in jax.tree.leaves(weights))
        calls = {
            "decode": decode_call(model, CONTEXTS["short"], num_tokens),
            "read": reading(num_bytes),
        }
        times = alternate(calls, effort)
        seconds = median(times["decode"]) / num_tokens
        rows.append(
            {
                "weights": quantize,
                "MB": num_bytes / 1e6,
                "tokens/s": 1 / seconds,
                "share of limit": num_tokens / block_ratio(times["decode"], times["read"]),
            }
        )
    return rows


def random_tokens(config: ModelConfig, batch: int, length: int) -> np.ndarray:
    """``[batch, length]`` random token ids."""
    return np.random.default_rng(0).integers(0, config.vocab_size, (batch, length), np.int32)


def recompute_call(model: LanguageModel, tokens: np.ndarray) -> Call:
    """The next token after `tokens` ``[1, T]`` from a forward pass over all of them."""
    graph, arrays = nnx.split(model)  # once: `nnx.jit` would split at each call

    @jax.jit
    def next_token(arrays: Any, tokens: jax.Array) -> jax.Array:
        return jnp.argmax(nnx.merge(graph, arrays)(tokens)[0][:, -1], axis=-1)

    return lambda: next_token(arrays, tokens)


def state_after(model: LanguageModel, prompt: np.ndarray) -> Any:
    """Decoder state after `prompt` ``[B, T]``."""
    return generate(model, prompt, max_new_tokens=0).state


def decode_call(
    model: LanguageModel, context: int, new_tokens: int, streams: int = 1, on_tokens: Any = None
) -> Call:
    """Generation after `context` random tokens, which are prefilled here, once."""
    state = state_after(model, random_tokens(model.config, streams, context))
    options: Any = {"max_new_tokens": new_tokens, "on_tokens": on_tokens}
    return lambda: generate(model, state=state, **options).state


def reading(num_bytes: int) -> Call:
    """Read `num_bytes` of memory once, by as many threads as there are cores."""
    count = os.cpu_count() or 1
    parts = np.array_split(np.ones(num_bytes // 8, np.uint64), count)
    pool = ThreadPoolExecutor(count)
    return lambda: sum(pool.map(np.sum, parts))


def run_lookup(
    effort: Effort, workdir: str, open_corpus: Callable[[str], TokenizedCorpus]
) -> Iterator[Table]:
    """Decoding with drafts from the text so far, compared with decoding token by token.

    Each kind has four prompts: a held-out document with another word for ``self``, after which the
    original begins again (edits); one that ends with three lines that begin alike (code); and a
    page of the documentation (prose). The model decides what follows. Prefill is not counted.
    """
    model, tokenizer, _ = load_model(workdir)
    split = open_corpus(workdir).validation
    if split is None:
        raise UserError(f"{workdir}: has no held-out text; train with validation_fraction above 0")
    begins = [text[:LOOKUP_PROMPT] for text in document_texts(split, tokenizer)]
    quarters = [(one, one[: len(one) // 4]) for one in begins]
    alike = (re.search(r"(?s).*\n(\s*\S.{8})[^\n]*\n(\1[^\n]*\n){2}", text) for text in begins)
    pages = [
        project.ROOT / "docs" / f"{name}.md" for name in ("attention", "data", "faq", "scaling")
    ]
    prompts = {
        "edits": [f"{x.replace('self', 'this')}\n{begin}" for x, begin in quarters if "self" in x],
        "code": [match[0] for match in alike if match],
        "prose": [page.read_text("utf-8")[:LOOKUP_PROMPT] for page in pages],
    }
    for kind, texts in prompts.items():
        if not texts:
            raise UserError(f"{workdir}: its held-out text has nothing for {kind}; train on code")
    rows: list[Row] = []
    for kind, temperature in itertools.product(prompts, (0.0, 0.8)):
        ids = [tokenizer.encode(text) for text in prompts[kind][:4]]

        def call(new: int, lookup: bool, ids: Any = ids, temperature: Any = temperature) -> Any:
            options: Any = {"max_new_tokens": new, "temperature": temperature, "lookup": lookup}
            return [generate(model, prompt, **options) for prompt in ids]

        kinds = {"lookup": (LOOKUP_TOKENS, True), "plain": (LOOKUP_TOKENS, False), "": (0, False)}
        times = alternate({name: functools.partial(call, *x) for name, x in kinds.items()}, effort)
        medians = {name: np.median(blocks, axis=1) for name, blocks in times.items()}
        with_drafts, without = (medians[x] - medians[""] for x in ("lookup", "plain"))
        count = len(ids) * LOOKUP_TOKENS
        row: Row = {"text": kind, "temperature": temperature}
        row |= {"tokens/s": count / np.median(with_drafts), "without": count / np.median(without)}
        row["ratio"] = float(np.median(without / with_drafts))
        accepted = sum(x.accepted.sum() for x in call(LOOKUP_TOKENS, True)) / count
        rows.append(row | {"accepted/token": accepted})
    yield Table("decode: lookup", rows)
