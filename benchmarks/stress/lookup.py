"""Decoding with drafts from a sequence's history, compared with decoding token by token."""

import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from simplernn_jax.config import ModelConfig
from simplernn_jax.errors import UserError
from simplernn_jax.inference import generate, quantize_model
from simplernn_jax.inference.engine import Engine, PrefixState, Sequences
from simplernn_jax.inference.sampling import Penalties, Sampling
from simplernn_jax.models import LanguageModel

from . import Case, run_cases

MODELS = {2: ("none", 4), 71: ("int4", 1), 259: ("int8", 4)}
"""Format of the weights and number of slots, by that of ids; of few ids, most drafts are right."""


def lookup(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Drafts change no bit of tokens, log-probabilities, counts or states."""
    del folder
    if not Engine(make_model(2)).is_native:
        raise UserError("lookup: decoding with drafts requires a CPU and a C compiler")
    return run_cases(_compare, count, seed)


@functools.cache
def make_model(vocab_size: int) -> LanguageModel:
    """A random model whose greedy text repeats itself."""
    sizes: Any = {"hidden_dim": 16, "key_dim": 8, "value_dim": 12, "num_heads": 2, "mlp_dim": 19}
    config = ModelConfig(vocab_size=vocab_size, num_layers=2, **sizes)
    model = LanguageModel(config, rngs=nnx.Rngs(vocab_size))
    return quantize_model(model, MODELS[vocab_size][0])


def draw_sequence(draw: random.Random, vocab_size: int) -> tuple[Sampling, list[int], Any]:
    """Settings, a prompt that may repeat itself, and the fields of the sequence."""
    settings: dict[str, Any] = {"seed": draw.getrandbits(32)}
    settings["temperature"] = draw.choice([0, 0.1, 0.7, 1.5])
    if draw.random() < 0.5:
        settings |= {"top_k": draw.randint(0, 5), "top_p": draw.choice([0.5, 0.9, 1.0])}
        settings["min_p"] = draw.choice([0, 0.05])
    if draw.random() < 0.5:
        settings["repetition_penalty"] = draw.choice([0.8, 1.0, 1.3])
        settings["presence_penalty"] = draw.choice([-0.5, 0, 0.4])
        settings["frequency_penalty"] = draw.choice([-0.1, 0, 0.2])
    if draw.random() < 0.3:
        settings["logit_bias"] = {draw.randrange(vocab_size): draw.uniform(-2, 2)}
    if draw.random() < 0.3:
        settings["stop_ids"] = (draw.randrange(vocab_size),)
    sampling = Sampling(**settings)
    once = [draw.randrange(vocab_size) for _ in range(draw.choice([1, 9, 60]))]
    prompt = once * draw.randint(1, 4)
    is_in = np.isin(np.arange(vocab_size), prompt)
    penalties: Any = (
        *(np.float32(sampling.repetition_penalty), np.float32(sampling.presence_penalty)),
        *(np.float32(sampling.frequency_penalty), is_in, np.zeros(vocab_size, np.int32)),
    )
    new = np.int32(draw.choice([1, 5, 40, 150]))
    fields = np.int32(draw.randrange(3)), np.int32(draw.randrange(1000)), new
    wants = np.bool_(draw.random() < 0.3)
    return sampling, prompt, (*fields, sampling.arrays(vocab_size), Penalties(*penalties), wants)


def _compare(number: int, draw: random.Random) -> Case:
    vocab_size = draw.choice(list(MODELS))
    model = make_model(vocab_size)
    engine, slots = Engine(model), MODELS[vocab_size][1]
    drawn = [draw_sequence(draw, vocab_size) for _ in range(slots)]
    prompts = [prompt for _, prompt, _ in drawn]
    state = generate(model, prompts, max_new_tokens=0).state
    rest = jax.tree.map(lambda *x: np.stack(x), *(fields for _, _, fields in drawn))
    is_active = np.zeros(slots, np.bool_)
    is_active[draw.sample(range(slots), draw.randint(1, min(slots, engine.max_lookups)))] = True
    lengths, found = [draw.randint(1, 128) for _ in range(3)], []
    for history in (None, engine.history([np.array(prompt, np.int32) for prompt in prompts])):
        arrays: Any = PrefixState(state.layers, state.logits), *rest, history
        sequences = Sequences(*arrays)
        sequences, blocks = jax.tree.map(jax.numpy.copy, sequences), []
        for length in lengths:
            block, sequences = engine.decode(sequences, is_active, length)
            blocks.append(jax.device_get(block))
        found.append((blocks, jax.device_get(sequences._replace(history=None))))
    problem = None
    for ours, theirs in zip(*(blocks for blocks, _ in found), strict=True):
        for n, count in enumerate(theirs.counts):
            pairs = [(ours.counts[n], count), (ours.tokens[n, :count], theirs.tokens[n, :count])]
            if rest[-1][n]:
                of_tokens = zip(ours.logprobs, theirs.logprobs, strict=True)
                pairs += [(a[n, :count], b[n, :count]) for a, b in of_tokens]
            if not all(np.array_equal(a, b) for a, b in pairs):
                problem = f"other tokens or log-probabilities of sequence {n}"
        if ours.has_ended != theirs.has_ended:
            problem = "other ends"
    leaves = zip(*(jax.tree.leaves(sequences) for _, sequences in found), strict=True)
    if not all(np.array_equal(a, b) for a, b in leaves):
        problem = problem or "another state"
    return Case(f"case {number}, {vocab_size} ids", problem, f"{vocab_size} ids")
