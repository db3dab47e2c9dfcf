"""The train step, one compiled program, and the state that it carries."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from simplernn_jax.array_types import ModelState
from simplernn_jax.config import Config
from simplernn_jax.data.batches import Batch
from simplernn_jax.parallel.shardings import (
    axes_specs,
    is_distributed,
    is_on_cpu,
    named_shardings,
    variable_specs,
)
from simplernn_jax.training.accumulation import choose_microbatches, split_into_windows
from simplernn_jax.training.batch_sharding import batch_specs, window_specs
from simplernn_jax.training.gradient import abstract_train_model, init_model, make_grad_fn


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
