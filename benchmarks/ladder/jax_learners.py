"""Training of our configurations, and of a stack of Flax's GRU cells."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from simplernn_jax.config import Config, ModelConfig, OptimizerConfig
from simplernn_jax.data.batch_iterator import make_batches
from simplernn_jax.data.batches import Batch
from simplernn_jax.data.evaluation_batches import evaluation_batches
from simplernn_jax.data.token_store import TokenizedCorpus
from simplernn_jax.training.evaluate import BATCH_TOKENS, MAX_BATCH_SIZE, Evaluator
from simplernn_jax.training.losses import cross_entropy
from simplernn_jax.training.optimizer import learning_rate_schedule, make_optimizer
from simplernn_jax.training.train_step import init_train_state, make_train_step

from ..train_steps import count_parameters
from ..training import GRUStack
from .learner import Learner
from .peers import Peer, data_config


class OurLearner(Learner):
    """Training of a configuration, as `simplernn_jax.training` runs it on one device."""

    def __init__(self, config: Config, corpus: TokenizedCorpus, steps: int, seed: int) -> None:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
        schedule = config.optimizer
        if steps < config.train.steps:
            warmup = min(schedule.warmup_steps, steps // 10)  # the share in shakespeare
            schedule = dataclasses.replace(schedule, warmup_steps=warmup)
        optimizer = make_optimizer(schedule, steps)
        pad_id = corpus.tokenizer.pad_id
        self.parameters = count_parameters(config)
        self._held_out: Any = corpus.validation
        self._batches = make_batches(corpus.train, config.data, seed, pad_id)
        self._state = jax.jit(lambda: init_train_state(config, optimizer))()
        self._step = make_train_step(config, optimizer)
        self._evaluator = Evaluator(config, pad_id)

    def step(self) -> None:
        """See `Learner.step`."""
        self._state, _ = self._step(self._state, next(self._batches))

    def wait(self) -> None:
        """See `Learner.wait`."""
        jax.block_until_ready(self._state)

    def evaluate(self, limit_tokens: int = 0) -> float:
        """See `Learner.evaluate`; the state is carried over each document."""
        scored = self._evaluator(self._state.params, self._held_out, limit_tokens)
        return scored.nats_per_token


class ResettingGRU(GRUStack):
    """`GRUStack` with a carry that is reset where documents begin."""

    def run(self, batch: Batch, carry: Any) -> tuple[jax.Array, Any]:
        """Logits ``[B, T, vocab]`` and the carry, ``[B, width]`` for each layer."""
        ids = batch.segment_ids
        begins = jnp.diff(ids, axis=1, prepend=ids[:, :1]) != 0
        kept = ~begins.at[:, 0].set(batch.reset).T[..., None]
        x, carries = jnp.swapaxes(self.embedding(batch.tokens), 0, 1), []
        for layer, start in zip(self.layers, carry, strict=True):

            def one_token(state: Any, token: Any, cell: Any = layer.cell) -> Any:
                return cell(jnp.where(token[1], state, 0), token[0])

            end, x = jax.lax.scan(one_token, start, (x, kept))
            carries.append(end)
        return self.head(jnp.swapaxes(x, 0, 1)).astype(jnp.float32), tuple(carries)


class GRULearner(Learner):
    """Training of a `ResettingGRU`; windows start from a zero state."""

    def __init__(
        self, peer: Peer, corpus: TokenizedCorpus, vocab: int, steps: int, rate: float, seed: int
    ) -> None:
        sizes = ModelConfig(vocab_size=vocab, num_layers=peer.layers, hidden_dim=peer.width)
        schedule = OptimizerConfig(
            learning_rate=rate, warmup_steps=steps // 20, final_learning_rate=0.1
        )
        adamw = optax.adamw(
            learning_rate_schedule(schedule, steps),
            b2=0.99,
            weight_decay=0.1,
            mask=lambda params: jax.tree.map(lambda values: values.ndim == 2, params),
        )
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
        graph, params = nnx.split(ResettingGRU(sizes, nnx.Rngs(seed)))
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        self._corpus, self._peer, self._state = corpus, peer, (params, optimizer.init(params))
        pad_id = corpus.tokenizer.pad_id
        self._batches = make_batches(corpus.train, data_config(peer), seed, pad_id)

        def score(params: Any, batch: Batch, carry: Any) -> Any:
            logits, carry = nnx.merge(graph, params).run(batch, carry)
            return jnp.sum(cross_entropy(logits, batch.targets, batch.loss_mask)), carry

        def step(state: Any, batch: Batch) -> Any:
            def mean_loss(params: Any) -> jax.Array:
                zeros = self._zeros(len(batch.reset))
                return score(params, batch, zeros)[0] / jnp.sum(batch.loss_mask)

            with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
                gradient = jax.grad(mean_loss)(state[0])
                updates, opt_state = optimizer.update(gradient, state[1], state[0])
            return optax.apply_updates(state[0], updates), opt_state

        self._step: Any = jax.jit(step, donate_argnums=0)
        self._score: Any = jax.jit(score)

    def _zeros(self, batch: int) -> Any:
        return (jnp.zeros((batch, self._peer.width)),) * self._peer.layers

    def step(self) -> None:
        """See `Learner.step`."""
        self._state = self._step(self._state, next(self._batches))

    def wait(self) -> None:
        """See `Learner.wait`."""
        jax.block_until_ready(self._state)

    def evaluate(self, limit_tokens: int = 0) -> float:
        """See `Learner.evaluate`; the state is carried over each document."""
        held_out: Any = self._corpus.validation
        pad_id, sizes = self._corpus.tokenizer.pad_id, (BATCH_TOKENS, MAX_BATCH_SIZE)
        batches, _ = evaluation_batches(held_out, *sizes, pad_id, limit_tokens)
        total, count, carry = 0.0, 0, None
        for batch in batches:
            carry = self._zeros(len(batch.reset)) if carry is None else carry
            nats, carry = self._score(self._state[0], batch, carry)
            total, count = total + float(nats), count + int(np.sum(batch.loss_mask))
        return total / count
