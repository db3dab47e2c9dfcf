"""One optimizer step as one compiled program, and the state that goes from step to step."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from simplernn_jax.array_types import ModelState
from simplernn_jax.config import Config
from simplernn_jax.data.batches import Batch
from simplernn_jax.models import LanguageModel
from simplernn_jax.ops.rows import clear_rows
from simplernn_jax.training.losses import summed_cross_entropy


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "step",
        "params",
        "opt_state",
        "rng",
        "carried",
        "skipped_updates",
        "skipped_in_a_row",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(kw_only=True)
class TrainState:
    """Everything a run goes on from, except its position in the data."""

    step: jax.Array
    """Optimizer steps taken, skipped ones included; int32."""
    params: nnx.State
    opt_state: optax.OptState
    rng: jax.Array
    """Raw key data; the dropout of step t is drawn from it folded with t."""
    carried: ModelState
    """The recurrent state that stream batches carry; () in other modes."""
    skipped_updates: jax.Array
    """Updates left out because a loss or gradient was not finite; int32."""
    skipped_in_a_row: jax.Array
    """Those of them since the last good update; int32."""


class StepMetrics(NamedTuple):
    """Numbers of one step, scalars on the device."""

    loss: jax.Array
    """Nats per predicted token."""
    gradient_norm: jax.Array
    """Before clipping."""
    predictions: jax.Array
    skipped_updates: jax.Array
    skipped_in_a_row: jax.Array


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def abstract_model(config: Config) -> tuple[nnx.GraphDef[LanguageModel], nnx.State]:
    """Structure and parameter shapes of the model, without computing anything."""
    model = nnx.eval_shape(lambda: LanguageModel(config.model, rngs=nnx.Rngs(0)))
    return nnx.split(model, nnx.Param)


def init_train_state(config: Config, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; everything in it follows from ``config.train.seed``."""
    model_key, dropout_key = jax.random.split(jax.random.key(config.train.seed))
    model = LanguageModel(config.model, rngs=nnx.Rngs(model_key))
    params = nnx.state(model, nnx.Param)
    rows = config.data.batch_size
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        rng=jax.random.key_data(dropout_key),
        carried=model.initial_state(rows) if config.data.mode == "stream" else (),
        skipped_updates=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
    )


def make_train_step(config: Config, optimizer: optax.GradientTransformation) -> TrainStep:
    """Compiles on first use; the old state is donated to the new one.

    A step whose loss or gradient is not finite changes nothing but the counters.
    """
    graph, _ = abstract_model(config)
    groups = config.train.gradient_accumulation
    dropout = config.model.dropout > 0

    def summed_loss(
        params: nnx.State, batch: Batch, carried: ModelState, key: jax.Array, predictions: jax.Array
    ) -> tuple[jax.Array, ModelState]:
        model = nnx.merge(graph, params)
        # Truncated BPTT: the carried state is a constant of this batch.
        carried = jax.lax.stop_gradient(clear_rows(carried, batch.reset))
        logits, new_carried = model(
            batch.tokens,
            carried or None,
            batch.segment_ids,
            dropout_key=key if dropout else None,
        )
        nats = summed_cross_entropy(logits, batch.targets, batch.loss_mask)
        return nats / predictions, new_carried if carried else ()

    loss_and_gradient = jax.value_and_grad(summed_loss, has_aux=True)

    def accumulated(
        state: TrainState, batch: Batch, predictions: jax.Array
    ) -> tuple[jax.Array, Any, ModelState]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        if groups == 1:
            (loss, carried), gradient = loss_and_gradient(
                state.params, batch, state.carried, key, predictions
            )
            return loss, gradient, carried

        def add(
            sums: tuple[jax.Array, Any], group: Any
        ) -> tuple[tuple[jax.Array, Any], ModelState]:
            index, rows, carried = group
            (loss, carried), gradient = loss_and_gradient(
                state.params, rows, carried, jax.random.fold_in(key, index), predictions
            )
            return jax.tree.map(jnp.add, sums, (loss, gradient)), carried

        by_group = jax.tree.map(
            lambda x: x.reshape(groups, -1, *x.shape[1:]), (batch, state.carried)
        )
        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
        (loss, gradient), carried = jax.lax.scan(add, zeros, (jnp.arange(groups), *by_group))
        return loss, gradient, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), carried)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        predictions = jnp.sum(batch.loss_mask)
        loss, gradient, carried = accumulated(state, batch, jnp.maximum(predictions, 1))
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        def update(kept: Any) -> Any:
            params, opt_state, _ = kept
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, carried

        # A condition, not a selection: choosing between old and new would copy all of the old.
        kept = (state.params, state.opt_state, state.carried)
        params, opt_state, new_carried = jax.lax.cond(finite, update, lambda kept: kept, kept)
        skipped = 1 - finite.astype(jnp.int32)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            rng=state.rng,
            carried=new_carried,
            skipped_updates=state.skipped_updates + skipped,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
        )
        return new_state, StepMetrics(
            loss=loss,
            gradient_norm=norm,
            predictions=predictions,
            skipped_updates=new_state.skipped_updates,
            skipped_in_a_row=new_state.skipped_in_a_row,
        )

    return jax.jit(train_step, donate_argnums=0)
