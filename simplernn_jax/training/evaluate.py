"""Token-weighted evaluation: state carried within each document, or overlapping contexts."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from simplernn_jax.array_types import ModelState
from simplernn_jax.config import Config
from simplernn_jax.data.batches import Batch
from simplernn_jax.data.evaluation_batches import Contexts, context_batches, evaluation_batches
from simplernn_jax.data.token_store import TokenSplit
from simplernn_jax.models.language_model import abstract_model
from simplernn_jax.models.memory_estimate import evaluation_sequences
from simplernn_jax.parallel.collectives import psum
from simplernn_jax.parallel.mesh import (
    BATCH_AXES,
    TOKEN_AXES,
    axes_specs,
    global_arrays_from_local,
    is_distributed,
    named_shardings,
    variable_specs,
)
from simplernn_jax.parallel.sequence import min_shard_tokens, shard_segment_ids
from simplernn_jax.training.losses import chunked_cross_entropy
from simplernn_jax.training.train_step import abstract_train_model, batch_specs

BATCH_TOKENS = 8192
"""Tokens scored in one call: large enough to saturate a CPU."""

MAX_BATCH_SIZE = 32
"""Maximum number of sequences in a batch; fewer where their states are large."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores of a model on a split."""

    nats_per_token: float
    """Mean negative log-likelihood of the scored targets."""
    bits_per_byte: float
    """Per UTF-8 byte of the text, end-of-document tokens included in the numerator. When only a
    part of the split is scored, the split's own ratio of tokens to bytes is used."""
    predictions: int
    """Number of targets scored."""

    @property
    def perplexity(self) -> float:
        """exp(nats per token); infinite where that overflows."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf

    def __str__(self) -> str:
        """Return the scores with their units."""
        return (
            f"{self.nats_per_token:.4f} nats/token, perplexity {self.perplexity:.2f}, "
            f"{self.bits_per_byte:.4f} bits/byte"
        )


class Scores(NamedTuple):
    """Scores of a model on one batch."""

    batch: Batch
    nats: jax.Array
    """float32 [B, T]: negative log-likelihood of every target; 0 where there is none."""
    total: jax.Array
    """Sum of `nats`, float32."""


class Evaluator:
    """Scores splits with one model structure; compiles once per batch shape.

    `pad_id` is the tokenizer's. On a mesh, batches and parameters are sharded as in training.
    """

    def __init__(self, config: Config, pad_id: int, mesh: Mesh | None = None):
        graph, abstract_params = (
            abstract_train_model(config) if is_distributed(mesh) else abstract_model(config.model)
        )
        abstract = nnx.merge(graph, abstract_params)
        self._pad_id = pad_id
        self._model = config.model

        def score(
            params: nnx.State, batch: Batch, carried: ModelState, initial: ModelState | None
        ) -> tuple[jax.Array, jax.Array, ModelState]:
            model = nnx.merge(graph, params)
            hidden, carried = model.hidden_states(
                batch.tokens,
                model.reset_states(carried, batch.reset, initial),
                shard_segment_ids(jnp.asarray(batch.segment_ids)),
            )
            nll = chunked_cross_entropy(model.logits, hidden, batch.targets, batch.loss_mask)
            return nll, psum(jnp.sum(nll), *TOKEN_AXES), carried

        self._shard_multiple = (1, 1)
        """Batch size and length are padded to multiples of these."""
        self._batch_shardings, state_shardings = None, None
        shardings: dict[str, Any] = {}
        if is_distributed(mesh):
            batch = batch_specs(mesh)
            state = axes_specs(abstract.state_axes(), mesh)
            inputs = (variable_specs(abstract_params, mesh), batch, state, PartitionSpec())
            outputs = (batch.loss_mask, PartitionSpec(), state)
            score = jax.shard_map(score, mesh=mesh, in_specs=inputs, out_specs=outputs)
            shardings["in_shardings"] = named_shardings(inputs, mesh)
            shardings["out_shardings"] = named_shardings(outputs, mesh)
            _, self._batch_shardings, state_shardings, _ = shardings["in_shardings"]
            sequence, stages = mesh.shape["sequence"], mesh.shape["pipeline"]
            shards = math.prod(mesh.shape[name] for name in BATCH_AXES)
            needed = min_shard_tokens(config.model)
            self._shard_multiple = shards, sequence * needed if sequence > 1 else stages
        self._score: Callable[..., tuple[jax.Array, jax.Array, ModelState]] = jax.jit(
            score, **shardings
        )
        self._initial_state = jax.jit(
            lambda params, batch_size: nnx.merge(graph, params).initial_state(batch_size),
            static_argnums=1,
            out_shardings=state_shardings,
        )

    def scores(
        self,
        params: nnx.State,
        split: TokenSplit,
        limit_tokens: int = 0,
        reset_every: int = 0,
        contexts: Contexts | None = None,
        initial: ModelState | None = None,
    ) -> Iterator[Scores]:
        """Yield the scores of every batch.

        Args:
          params: the model's parameters.
          split: the text to score.
          limit_tokens: number of targets to score, a deterministic subset; 0 scores all.
          reset_every: reset the state every `reset_every` tokens of a document; 0 never resets.
          contexts: if given, documents are scored in overlapping ones, each from the initial state.
          initial: a learned initial state, leaves ``[1, ...]``; None: the model's.

        Raises:
          UserError: the split holds nothing to predict, or contexts do not cover every token.
        """
        sizes = BATCH_TOKENS, evaluation_sequences(self._model, MAX_BATCH_SIZE)
        if contexts is None:
            batches = evaluation_batches(
                split,
                *sizes,
                self._pad_id,
                limit_tokens,
                reset_every,
                self._shard_multiple,
                aligned=initial is not None,  # only there the state is not reset to zero
            )
        else:
            batches = context_batches(
                split, contexts, *sizes, self._pad_id, limit_tokens, self._shard_multiple
            )
        carried = None
        for batch in batches:
            batch_size = len(batch.reset)
            carried = self._initial_state(params, batch_size) if carried is None else carried
            placed = batch
            if self._batch_shardings is not None:
                placed = global_arrays_from_local(batch, self._batch_shardings, 0, batch_size)
            nats, total, carried = self._score(params, placed, carried, initial)
            yield Scores(batch, nats, total)

    def __call__(
        self, params: nnx.State, split: TokenSplit, *args: Any, **options: Any
    ) -> Evaluation:
        """Return the mean over the targets of `scores`, whose arguments and errors these are."""
        nats: list[Any] = []
        predictions = 0
        for scores in self.scores(params, split, *args, **options):
            # At most two batches in flight: with dozens, XLA's CPU backend can run out of threads
            # while all of them wait for another process.
            nats[-1:] = map(float, nats[-1:])
            nats.append(scores.total)
            predictions += int(np.sum(scores.batch.loss_mask))
        # Summed in float64 on the host, so that results do not depend on batch size.
        total_nats = float(np.sum(np.asarray(nats, np.float64)))
        nats_per_token = total_nats / predictions if predictions else math.nan
        tokens_per_byte = split.num_predictions / max(split.num_bytes, 1)
        return Evaluation(
            nats_per_token, nats_per_token * tokens_per_byte / math.log(2), predictions
        )
