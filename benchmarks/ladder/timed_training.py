"""One training whose held-out loss is measured against the seconds of its steps."""

import dataclasses
import math
import time
from typing import Any

import numpy as np

from simplernn_jax.config import Config
from simplernn_jax.data.token_store import TokenizedCorpus, TokenSplit
from simplernn_jax.errors import UserError
from simplernn_jax.training.preparation import prepare

from ..tables import Row
from .learner import Learner
from .peers import ON_TORCH, OURS, data_config, find_peer

POINTS = 16
"""Evaluations of a training, denser at its beginning. While they have taken longer than training,
all but the last are left out: attention scores overlapping contexts."""
CURVE_TOKENS = 131_072
"""Held-out tokens of each, or all if there are fewer."""
CALIBRATION = 0.05
"""Part of the seconds in which steps are timed beforehand."""
RANDOM_TOKENS = 153_600
"""Tokens of nanoGPT's estimate: 200 batches of its CPU settings."""


def train_timed(
    config: Config,
    workdir: str,
    name: str,
    seconds: float = 0.0,
    rate: float | None = None,
    seed: int = 0,
    is_tuning: bool = False,
) -> Row:
    """Train `name`, one of `peers.known_names`, on the text of `config`; for `call_isolated`.

    With `seconds`, the time of all steps, their number is estimated from some timed beforehand.
    `rate` is a peer's peak learning rate, if not that of its settings. With `is_tuning`, the last
    tenth of the training text is held out instead of the validation split, which does not depend on
    `seed`, and only the final loss is computed.

    Returns:
      Its sizes; ``loss`` of the whole held-out text in nats/token; and ``curve``: pairs of seconds
      of steps (without the first, which compiles, and without evaluations) and loss of a part.

    Raises:
      UserError: nothing is held out.
    """
    config, corpus = prepare(config, workdir)
    if corpus.validation is None:
        raise UserError("ladder: nothing is held out; set config.data.validation_fraction")
    corpus = hold_out_training_text(corpus) if is_tuning else corpus
    steps = config.train.steps if name == OURS else find_peer(name, config).steps
    if seconds:
        trial = make_learner(name, config, corpus, steps, rate, seed)
        steps = max(2, int(seconds / seconds_per_step(trial, CALIBRATION * seconds)))
    learner = make_learner(name, config, corpus, steps, rate, seed)
    started = time.perf_counter()
    learner.step()
    learner.wait()
    first = time.perf_counter() - started
    curve, trained, evaluating, taken, scored = [], 0.0, 0.0, 1, 1
    for point in range(1, POINTS + 1):
        until = max(2, round(steps * (point / POINTS) ** 1.5))
        started = time.perf_counter()
        for _ in range(taken, until):
            learner.step()
        learner.wait()
        trained += time.perf_counter() - started
        taken = until
        if taken > scored and not is_tuning and (evaluating <= trained or point == POINTS):
            started = time.perf_counter()
            curve.append([trained, learner.evaluate(CURVE_TOKENS)])
            evaluating += time.perf_counter() - started
            scored = taken
    held_out: Any = corpus.validation
    data = config.data if name == OURS else data_config(find_peer(name, config))
    return {
        "program": name,
        "seed": seed,
        "rate": rate,
        "parameters": learner.parameters,
        "steps": taken,
        "tokens": taken * data.batch_size * data.sequence_length,
        "seconds": trained,
        "first step seconds": first,
        "loss": learner.evaluate(),
        "random blocks": None if is_tuning else learner.random_blocks(RANDOM_TOKENS),
        "bits/byte per nat": held_out.num_predictions / held_out.num_bytes / math.log(2),
        "curve": curve,
    }


def make_learner(
    name: str, config: Config, corpus: TokenizedCorpus, steps: int, rate: float | None, seed: int
) -> Learner:
    """A model before its first step, whose learning rate ends after `steps`."""
    if name == OURS:
        from .jax_learners import OurLearner

        return OurLearner(config, corpus, steps, seed)
    peer = find_peer(name, config)
    rate = peer.rate if rate is None else rate
    if peer.model in ON_TORCH:
        from .torch_learners import TorchLearner

        return TorchLearner(peer, corpus, config.model.vocab_size, steps, rate, seed)
    from .jax_learners import GRULearner

    return GRULearner(peer, corpus, config.model.vocab_size, steps, rate, seed)


def seconds_per_step(learner: Learner, seconds: float) -> float:
    """Mean time of the steps that begin within `seconds`, and at least of two, after the first."""
    learner.step()
    learner.wait()
    started, taken = time.perf_counter(), 0
    while taken < 2 or time.perf_counter() - started < seconds:
        for _ in range(2 if taken < 2 else 8):  # in training, batches are made during steps
            learner.step()
            taken += 1
        learner.wait()
    return (time.perf_counter() - started) / taken


def hold_out_training_text(corpus: TokenizedCorpus) -> TokenizedCorpus:
    """The training split in two: its last tenth is held out to choose a learning rate."""
    whole = corpus.train
    cut, starts = len(whole.tokens) * 9 // 10, whole.document_starts
    later = [0, *(starts[starts > cut] - cut)]
    parts = (
        ("train", slice(0, cut), starts[starts < cut]),
        ("validation", slice(cut, None), np.array(later, starts.dtype)),
    )
    train, validation = (
        TokenSplit(
            name,
            whole.tokens[part],
            part_starts,
            whole.num_bytes * len(whole.tokens[part]) // len(whole.tokens),
            f"{whole.content_hash} {name}",
            None if whole.targets is None else whole.targets[part],
        )
        for name, part, part_starts in parts
    )
    return dataclasses.replace(corpus, train=train, validation=validation)
