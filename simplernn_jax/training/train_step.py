"""The train step: state, loss and gradient of a batch, shardings, and the compiled update."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from simplernn_jax.array_types import LogicalAxes, ModelState
from simplernn_jax.config import Config
from simplernn_jax.data.batches import Batch
from simplernn_jax.models import memory_estimate
from simplernn_jax.models.language_model import Initialized, initialize
from simplernn_jax.ops.primitive import vary_like, varying
from simplernn_jax.parallel.collectives import axis_index, psum
from simplernn_jax.parallel.mesh import BATCH_AXES, TOKEN_AXES, drop_trivial_axes, partition_spec
from simplernn_jax.parallel.sequence import shard_segment_ids
from simplernn_jax.parallel.shardings import (
    axes_specs,
    is_distributed,
    is_on_cpu,
    named_shardings,
    variable_specs,
)
from simplernn_jax.training.accumulation import (
    accumulate_gradients,
    choose_microbatches,
    remat_windows,
    split_into_windows,
    truncated_bptt,
    value_and_grad_with_carry,
)
from simplernn_jax.training.losses import chunked_cross_entropy

ANALYSIS_THRESHOLD = 0.25
"""Fraction of device memory above which the step is compiled and analyzed: the estimate is about a
third of XLA's analysis, and compilation takes about 10 s."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(kw_only=True)
class TrainState:
    """Training state carried between steps; with the data position, all that resuming needs."""

    step: jax.Array
    """Optimizer steps taken, skipped ones included; int32."""
    params: nnx.State
    """float32 parameters of the model."""
    opt_state: optax.OptState
    """State of the optimizer, moments in float32."""
    rng: jax.Array
    """Raw uint32 of `jax.random.key_data`; the dropout key of step t is ``fold_in(key, t)``, folded
    further with device, microbatch, window, layer and, in a pipeline, time chunk."""
    carried: ModelState
    """Recurrent state carried between stream batches; () in other modes."""
    skipped_updates: jax.Array
    """Updates skipped because a loss or gradient was not finite; int32."""
    consecutive_skips: jax.Array
    """Skipped updates since the last applied one; int32."""


class StepMetrics(NamedTuple):
    """Metrics of one step, float32 or int32 scalars on the device; counters as in `TrainState`."""

    loss: jax.Array
    """Nats per target token."""
    gradient_norm: jax.Array
    """Global norm before clipping."""
    predictions: jax.Array
    """Number of target tokens of the batch."""
    skipped_updates: jax.Array
    consecutive_skips: jax.Array


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def init_train_state(config: Config, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step, initialized from ``config.train.seed``.

    Raises:
      ValueError: there are pipeline stages, and the layers differ.
    """
    model_key, dropout_key = jax.random.split(jax.random.key(config.train.seed))
    graph, params = init_model(config, model_key)
    carried: ModelState = ()
    if config.data.mode == "stream":
        carried = nnx.merge(graph, params).initial_state(config.data.batch_size)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        rng=jax.random.key_data(dropout_key),
        carried=carried,
        skipped_updates=jnp.zeros((), jnp.int32),
        consecutive_skips=jnp.zeros((), jnp.int32),
    )


def state_specs(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Return the `PartitionSpec` of each array of the state."""
    state = jax.eval_shape(lambda: init_train_state(config, optimizer))
    specs: TrainState = variable_specs(state, mesh)
    if state.carried:
        axes = nnx.merge(*abstract_train_model(config)).state_axes()
        specs = dataclasses.replace(specs, carried=axes_specs(axes, mesh))
    return specs


def state_shardings(
    config: Config, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState | None:
    """Return the shardings of the state's arrays; None on one device."""
    if not is_distributed(mesh):
        return None
    shardings: TrainState = named_shardings(state_specs(config, optimizer, mesh), mesh)
    return shardings


def batch_specs(mesh: Mesh) -> Batch:
    """Return the `PartitionSpec` of each array of a batch.

    Sequences are sharded over ``data`` and ``fsdp``, their tokens over ``sequence``. Every stage
    sees all tokens, and computes the loss of its time shard: only what the loss needs is sharded
    over ``pipeline``.
    """
    sequences: Any = partition_spec(LogicalAxes("batch"), mesh)
    tokens: Any = partition_spec(LogicalAxes("batch", "time"), mesh)
    loss_tokens: Any = drop_trivial_axes(P(BATCH_AXES, ("sequence", "pipeline")), mesh)
    return Batch(tokens, loss_tokens, loss_tokens, tokens, reset=sequences)


def window_specs(mesh: Mesh) -> Batch:
    """Return `batch_specs` of `split_into_windows`: each window's tokens are sharded."""
    specs: Any = batch_specs(mesh)
    token_specs: Any = [P(spec[0], None, spec[1]) for spec in specs[:4]]
    return Batch._make([*token_specs, specs.reset])


def batch_shardings(mesh: Mesh) -> Batch | None:
    """Return the shardings of a batch's arrays; None on one device."""
    return named_shardings(batch_specs(mesh), mesh) if is_distributed(mesh) else None


BatchGradFn = Callable[
    [nnx.State, Batch, ModelState, jax.Array, jax.Array],
    tuple[jax.Array, jax.Array, nnx.State, ModelState],
]


def init_model(config: Config, key: jax.Array) -> Initialized:
    """Initialize the model for training: rematerialized, and stacked if there are stages."""
    return initialize(
        config.model, key, remat=config.train.remat, stack_layers=config.mesh.pipeline > 1
    )


def abstract_train_model(config: Config) -> Initialized:
    """Return graphdef and abstract parameters of `init_model`."""
    abstract: Initialized = jax.eval_shape(lambda: init_model(config, jax.random.key(0)))
    return abstract


def make_grad_fn(config: Config) -> BatchGradFn:
    """Build the loss and gradient function of a batch.

    It maps ``(params, batch, carried, rng, step)`` to ``(loss, predictions, gradient, carried)``;
    `rng` is raw uint32 key data, `step` int32. With ``train.bptt_window``, the batch is split
    by `split_into_windows`; ``train.gradient_accumulation`` None means 1. The loss is the mean over
    all predictions, in nats. Inside `jax.shard_map`, arguments and results are this device's
    shards, but loss and predictions are global.
    """
    graph, _ = abstract_train_model(config)
    dropout = config.model.dropout > 0

    def loss_fn(
        params: nnx.State, batch: Batch, carried: ModelState, key: jax.Array, predictions: jax.Array
    ) -> tuple[jax.Array, ModelState]:
        model = nnx.merge(graph, params)
        hidden, carried = model.hidden_states(
            batch.tokens,
            model.reset_states(carried, batch.reset) if carried else None,
            shard_segment_ids(jnp.asarray(batch.segment_ids)),
            dropout_key=key if dropout else None,
        )
        losses = chunked_cross_entropy(model.logits, hidden, batch.targets, batch.loss_mask)
        nll = jnp.sum(losses)
        return nll / predictions.astype(nll.dtype), carried

    if not config.train.bptt_window:
        microbatch_grad_fn = value_and_grad_with_carry(loss_fn)
    elif config.train.bptt == "truncated":
        microbatch_grad_fn = truncated_bptt(loss_fn)
    else:
        microbatch_grad_fn = value_and_grad_with_carry(remat_windows(loss_fn))
    sum_grad_fn = accumulate_gradients(microbatch_grad_fn, config.train.gradient_accumulation or 1)

    def batch_grad_fn(
        params: nnx.State, batch: Any, carried: ModelState, rng: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, jax.Array, nnx.State, ModelState]:
        predictions = psum(jnp.sum(batch.loss_mask), *TOKEN_AXES)
        key = _fold_in_device(jax.random.fold_in(jax.random.wrap_key_data(rng), step))
        # Cast to varying, so that their gradients are summed over devices once, after all
        # microbatches.
        varying_params = jax.tree.map(lambda param: vary_like(param, *batch), params)
        divisor = jnp.maximum(predictions, 1)
        loss, gradient, final = sum_grad_fn(varying_params, batch, carried, key, divisor)
        carried = final if carried else ()
        return psum(loss, *TOKEN_AXES), predictions, _sum_over_replicas(gradient, params), carried

    return batch_grad_fn


def _fold_in_device(key: jax.Array) -> jax.Array:
    """Derive a dropout key for each device that sees different tokens."""
    for name in TOKEN_AXES:
        if not isinstance(index := axis_index(name), int):
            key = jax.random.fold_in(key, index)
    return key


def _sum_over_replicas(gradient: nnx.State, params: nnx.State) -> nnx.State:
    """Sum over the devices that hold the same shard of a parameter and see different tokens."""

    def total(gradient: jax.Array, param: jax.Array) -> jax.Array:
        return psum(gradient, *(name for name in TOKEN_AXES if name not in varying(param)))

    return jax.tree.map(total, gradient, params)


def make_train_step(
    config: Config, optimizer: optax.GradientTransformation, mesh: Mesh | None = None
) -> TrainStep:
    """Return the train step, which compiles at its first call and donates the old state.

    A step whose loss or gradient is not finite only advances the counters.

    Args:
      config: the run's configuration.
      optimizer: result of `make_optimizer`.
      mesh: the devices; None, or a mesh of size 1, runs on the default device. State and batch are
        sharded by `state_specs` and `batch_specs`.

    Raises:
      ValueError: there are pipeline stages, and the layers differ.
    """
    config = choose_microbatches(config, mesh)
    grad_fn, window = make_grad_fn(config), config.train.bptt_window
    optimizer = optax.with_extra_args_support(optimizer)
    options: dict[str, Any] = {}
    if is_distributed(mesh):
        state, batch = state_specs(config, optimizer, mesh), batch_specs(mesh)
        grad_batch = window_specs(mesh) if window else batch
        grad_fn = jax.shard_map(
            grad_fn,
            mesh=mesh,
            in_specs=(state.params, grad_batch, state.carried, P(), P()),
            out_specs=(P(), P(), state.params, state.carried),
        )
        states = named_shardings(state, mesh)
        options["in_shardings"] = (states, named_shardings(batch, mesh))
        options["out_shardings"] = (states, NamedSharding(mesh, P()))
    if is_distributed(mesh) or config.train.remat != "none":
        options["compiler_options"] = _compiler_options(mesh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        batch = split_into_windows(batch, window) if window else batch
        loss, predictions, gradient, carried = grad_fn(
            state.params, batch, state.carried, state.rng, state.step
        )
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        def update(old: Any) -> Any:
            params, opt_state, _ = old
            # If this branch computed the norm again, its last bits would depend on the number of
            # threads.
            updates, opt_state = optimizer.update(gradient, opt_state, params, norm=norm)
            return optax.apply_updates(params, updates), opt_state, carried

        # `cond`, not `where`, which would copy the old state.
        old = (state.params, state.opt_state, state.carried)
        params, opt_state, new_carried = jax.lax.cond(finite, update, lambda old: old, old)
        skipped = 1 - finite.astype(jnp.int32)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            rng=state.rng,
            carried=new_carried,
            skipped_updates=state.skipped_updates + skipped,
            consecutive_skips=(state.consecutive_skips + 1) * skipped,
        )
        return new_state, StepMetrics(
            loss=loss,
            gradient_norm=norm,
            predictions=predictions,
            skipped_updates=new_state.skipped_updates,
            consecutive_skips=new_state.consecutive_skips,
        )

    return jax.jit(train_step, donate_argnums=0, **options)


def _compiler_options(mesh: Mesh | None) -> dict[str, str]:
    """Return options that keep XLA from undoing rematerialization.

    XLA of jax 0.10 removes the barriers of `jax.checkpoint` on CPUs before its last
    common-subexpression elimination (CSE), which would merge intended re-gathers and recomputation.
    """
    return {"xla_disable_hlo_passes": "cse_barrier_expander"} if is_on_cpu(mesh) else {}


def check_memory(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> None:
    """Raise `UserError` if the train step does not fit in memory, before anything is allocated.

    By an estimate, and by XLA's memory analysis if the estimate is a quarter of device memory or
    more.
    """
    config = choose_microbatches(config, mesh)
    if memory_estimate.check_training(config, mesh) < ANALYSIS_THRESHOLD:
        return
    step: Any = make_train_step(config, optimizer, mesh)
    state = jax.eval_shape(lambda: init_train_state(config, optimizer))
    # The first step takes this program from the compilation cache.
    sizes = step.lower(state, _abstract_batch(config)).compile().memory_analysis()
    if sizes is not None:
        needed = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
        memory_estimate.check_program(needed, mesh)


def _abstract_batch(config: Config) -> Batch:
    shape = (config.data.batch_size, config.data.sequence_length)
    ids, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    return jax.eval_shape(lambda: Batch(ids, ids, mask, ids, mask[:, 0]))
