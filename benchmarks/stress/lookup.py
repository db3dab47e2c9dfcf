"""Decoding with drafts from the text so far, compared with decoding token by token."""

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
from simplernn_jax.inference.engine import Engine, PrefixState
from simplernn_jax.inference.lookup import MAX_SEQUENCES, decode_with_drafts, make_history
from simplernn_jax.inference.sampling import Sampling
from simplernn_jax.models import LanguageModel
from simplernn_jax.serving.jobs import Job
from simplernn_jax.serving.scheduler import new_sequence

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


def _draw(draw: random.Random, vocab_size: int) -> Job:
    """A prompt that may repeat itself, with any settings."""
    prompt = [draw.randrange(vocab_size) for _ in range(draw.choice([1, 9, 60]))]
    sampling = Sampling(
        temperature=draw.choice([0, 0.1, 0.7, 1.5]),
        top_k=draw.choice([0, 0, 4]),
        top_p=draw.choice([0.5, 1, 1]),
        min_p=draw.choice([0, 0, 0.05]),
        repetition_penalty=draw.choice([1, 1.3]),
        presence_penalty=draw.choice([0, 0.4]),
        frequency_penalty=draw.choice([0, -0.1]),
        logit_bias={draw.randrange(vocab_size): draw.uniform(-2, 2)},
        stop_ids=draw.choice([(), (), (draw.randrange(vocab_size),)]),
        seed=draw.getrandbits(32),
    )
    return Job(
        np.array(prompt * draw.randint(1, 4), np.int32),
        sampling,
        max_tokens=draw.choice([1, 5, 40, 150]),
        num_logprobs=draw.choice([None, None, 2]),
    )


def _compare(number: int, draw: random.Random) -> Case:
    vocab_size = draw.choice(list(MODELS))
    model, num_slots = make_model(vocab_size), MODELS[vocab_size][1]
    engine = Engine(model)
    jobs = [_draw(draw, vocab_size) for _ in range(num_slots)]
    state = generate(model, [job.tokens for job in jobs], max_new_tokens=0).state
    parts = [new_sequence(job, draw.randrange(3), vocab_size) for job in jobs]
    sequences = jax.tree.map(lambda *x: np.stack(x), *parts)
    sequences = sequences._replace(state=PrefixState(state.layers, state.logits))
    slots = sorted(draw.sample(range(num_slots), min(num_slots, MAX_SEQUENCES)))
    history = make_history(vocab_size, [jobs[slot].tokens for slot in slots], len(slots))
    plain, ahead = (jax.tree.map(jnp.copy, sequences) for _ in range(2))
    differences = set()
    for length in [draw.randint(1, 128) for _ in range(3)]:
        expected, plain = engine.decode(plain, np.isin(np.arange(num_slots), slots), length)
        block, ahead, history = decode_with_drafts(engine, ahead, history, slots, length)
        for row, slot in enumerate(slots):
            count = int(expected.counts[slot])
            results = [
                x[slot, :count] for x in jax.tree.leaves((expected.tokens, expected.logprobs))
            ]
            found = [x[row, :count] for x in jax.tree.leaves((block.tokens, block.logprobs))]
            if block.counts[row] != count or not all(map(np.array_equal, found, results)):
                differences.add("tokens")
    if not all(map(np.array_equal, *map(jax.tree.leaves, (ahead, plain)))):
        differences.add("states")
    problem = f"drafts change {' and '.join(sorted(differences))}" if differences else None
    return Case(f"case {number}, {vocab_size} ids", problem, f"{vocab_size} ids")
