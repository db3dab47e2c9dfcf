"""Decoding with drafts from a sequence's history, compared with decoding token by token."""

import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplernn_jax.config import ModelConfig
from simplernn_jax.inference import generate, quantize_model
from simplernn_jax.inference.engine import LOOKUPS, MAX_BLOCK, Engine, PrefixState, Sequences
from simplernn_jax.inference.sampling import Penalties, Sampling
from simplernn_jax.models import LanguageModel

from . import Case, run_cases

MODELS = {2: ("none", 4), 71: ("int4", 1), 259: ("int8", 4)}
"""Format of the weights and number of slots, by that of ids; of few ids, most drafts are right."""


def lookup(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Drafts change no bit of tokens, log-probabilities, counts or states."""
    del folder
    return run_cases(_compare, count, seed)


@functools.cache
def make_model(vocab_size: int) -> LanguageModel:
    """A random model whose greedy text repeats itself."""
    sizes: Any = {"hidden_dim": 16, "key_dim": 8, "value_dim": 12, "num_heads": 2, "mlp_dim": 19}
    config = ModelConfig(vocab_size=vocab_size, num_layers=2, **sizes)
    model = LanguageModel(config, rngs=nnx.Rngs(vocab_size))
    return quantize_model(model, MODELS[vocab_size][0])


def _draw(draw: random.Random, vocab_size: int) -> tuple[np.ndarray, Any]:
    """A prompt that may repeat itself, and its sequence without state and history."""
    prompt = [draw.randrange(vocab_size) for _ in range(draw.choice([1, 9, 60]))]
    prompt *= draw.randint(1, 4)
    sampling = Sampling(
        temperature=draw.choice([0, 0.1, 0.7, 1.5]),
        top_k=draw.choice([0, 0, 4]),
        top_p=draw.choice([0.5, 1, 1]),
        min_p=draw.choice([0, 0, 0.05]),
        logit_bias={draw.randrange(vocab_size): draw.uniform(-2, 2)},
        stop_ids=draw.choice([(), (), (draw.randrange(vocab_size),)]),
        seed=draw.getrandbits(32),
    )
    penalties = [
        draw.choice([value, neutral]) for value, neutral in ((1.3, 1), (0.4, 0), (-0.1, 0))
    ]
    is_in, counts = np.isin(np.arange(vocab_size), prompt), np.zeros(vocab_size, np.int32)
    arrays: Any = *map(np.float32, penalties), is_in, counts
    stream, position, new = draw.randrange(3), draw.randrange(1000), draw.choice([1, 5, 40, 150])
    rest = sampling.arrays(vocab_size), Penalties(*arrays), np.bool_(draw.random() < 0.3)
    return np.array(prompt, np.int32), (*map(np.int32, (stream, position, new)), *rest)


def _compare(number: int, draw: random.Random) -> Case:
    vocab_size = draw.choice(list(MODELS))
    model, slots = make_model(vocab_size), MODELS[vocab_size][1]
    engine = Engine(model)
    prompts, drawn = zip(*(_draw(draw, vocab_size) for _ in range(slots)), strict=True)
    state = generate(model, prompts, max_new_tokens=0).state
    rest: Any = jax.tree.map(lambda *x: np.stack(x), *drawn)
    is_active = np.isin(np.arange(slots), draw.sample(range(slots), min(slots, LOOKUPS)))
    lengths, results = [draw.randint(1, 128) for _ in range(3)], []
    for history in (None, engine.history(prompts)):
        arrays: Any = PrefixState(state.layers, state.logits), *rest, history
        sequences = Sequences(*arrays)
        sequences, blocks = jax.tree.map(jnp.copy, sequences), []
        for length in lengths:
            block, sequences = engine.decode(sequences, is_active, length)
            is_new = np.arange(MAX_BLOCK) < np.asarray(block.counts)[:, None]
            wanted = [is_new[n] & rest[-1][n] for n in range(slots)]
            logprobs = [np.asarray(x)[np.array(wanted)] for x in block.logprobs or ()]
            blocks.append([np.asarray(block.tokens)[is_new], block.counts, logprobs])
        results.append([*jax.tree.leaves((blocks, sequences._replace(history=None)))])
    is_same = all(map(np.array_equal, *results))
    problem = None if is_same else "drafts change tokens, log-probabilities or states"
    return Case(f"case {number}, {vocab_size} ids", problem, f"{vocab_size} ids")
