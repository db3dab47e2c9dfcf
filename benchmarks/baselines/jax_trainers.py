"""Training of our configurations, and of a stack of Flax's GRU cells."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from simplernn_jax.config import Config, ModelConfig
from simplernn_jax.data.batches import Batch
from simplernn_jax.data.token_store import TokenizedCorpus
from simplernn_jax.training.evaluate import Evaluator
from simplernn_jax.training.losses import cross_entropy
from simplernn_jax.training.optimizer import learning_rate_schedule, make_optimizer
from simplernn_jax.training.train_step import init_train_state, make_train_step

from ..train_steps import count_parameters
from ..training import GRUStack, jitted_step
from .programs import Baseline
from .trainer import Trainer


class JaxTrainer(Trainer):
    """A train state and its jitted step."""

    _state: Any
    _step: Any

    def take(self, steps: int) -> None:
        """See `Trainer.take`."""
        for _ in range(steps):
            self._state, _ = self._step(self._state, next(self._batches))
        jax.block_until_ready(self._state)


class OurTrainer(JaxTrainer):
    """Training of a configuration, as `simplernn_jax.training` runs it on one device."""

    def __init__(self, config: Config, corpus: TokenizedCorpus, steps: int, seed: int) -> None:
        super().__init__(corpus, config.data, seed)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
        schedule = config.optimizer
        if steps < config.train.steps:
            warmup = min(schedule.warmup_steps, steps // 10)  # the share in shakespeare
            schedule = dataclasses.replace(schedule, warmup_steps=warmup)
        optimizer = make_optimizer(schedule, steps)
        self.parameters = count_parameters(config)
        self._state = jax.jit(lambda: init_train_state(config, optimizer))()
        self._step = make_train_step(config, optimizer)
        self._evaluator = Evaluator(config, self._pad_id)

    def evaluate(self, limit_tokens: int = 0) -> float:
        """See `Trainer.evaluate`."""
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


class GRUTrainer(JaxTrainer):
    """Training of a `ResettingGRU`; windows start from a zero state."""

    def __init__(
        self, baseline: Baseline, corpus: TokenizedCorpus, vocab: int, steps: int, seed: int
    ) -> None:
        super().__init__(corpus, baseline.data_config(), seed)
        self._baseline = baseline
        adamw = optax.adamw(
            learning_rate_schedule(baseline.schedule(steps), steps),
            b2=0.99,
            weight_decay=0.1,
            mask=lambda params: jax.tree.map(lambda values: values.ndim == 2, params),
        )
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
        layers, width = baseline.layers, baseline.width
        sizes = ModelConfig(vocab_size=vocab, num_layers=layers, hidden_dim=width)
        graph, params = nnx.split(ResettingGRU(sizes, nnx.Rngs(seed)))
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(params))

        def score(params: Any, batch: Batch, carry: Any) -> Any:
            logits, carry = nnx.merge(graph, params).run(batch, carry)
            return jnp.sum(cross_entropy(logits, batch.targets, batch.loss_mask)), carry

        def mean_loss(params: Any, batch: Batch) -> jax.Array:
            nats, _ = score(params, batch, self._zeros(batch))
            return nats / jnp.sum(batch.loss_mask, dtype=jnp.float32)

        self._state = params, optimizer.init(params)
        self._step, self._score = jitted_step(mean_loss, optimizer), jax.jit(score)

    def _zeros(self, batch: Batch) -> Any:
        return (jnp.zeros((len(batch.reset), self._baseline.width)),) * self._baseline.layers

    def score(self, batch: Batch, carry: Any) -> tuple[float, Any]:
        """See `Trainer.score`."""
        carry = self._zeros(batch) if carry is None else carry
        nats, carry = self._score(self._state[0], batch, carry)
        return float(nats), carry
