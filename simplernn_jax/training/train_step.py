"""The train step: its state, the loss, the gradient of a batch, and the compiled update.

`make_grad_fn` differentiates the loss of a part of the batch and sums over BPTT windows,
microbatches and devices; `make_train_step` updates the parameters with the sum.
"""

import dataclasses
import math
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
from simplernn_jax.ops.segments import segment_starts
from simplernn_jax.parallel.collectives import axis_index, psum
from simplernn_jax.parallel.mesh import (
    BATCH_AXES,
    TOKEN_AXES,
    axes_specs,
    drop_trivial_axes,
    is_distributed,
    is_on_cpu,
    named_shardings,
    partition_spec,
    variable_specs,
)
from simplernn_jax.parallel.sequence import shard_segment_ids
from simplernn_jax.training.losses import chunked_cross_entropy
from simplernn_jax.training.tuning import init_tuned, stop_gradients, trained_part, with_trained

ANALYSIS_THRESHOLD = 0.25
"""Fraction of device memory above which the step is compiled and analyzed: the estimate is about a
third of XLA's analysis, and compilation takes about 10 s."""

_MICROBATCH_TOKENS = 1024
"""With a few hundred channels, a layer's activations are a few MB, the size of an L2 cache."""
_MAX_SEQUENCES = 8192
"""Number of sequences up to which the divisors of a batch are searched."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(kw_only=True)
class TrainState:
    """Training state carried between steps; with the data position, all that resuming needs."""

    step: jax.Array
    """Optimizer steps taken, skipped ones included; int32."""
    params: nnx.State
    """float32 parameters of the model."""
    tuned: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What fine-tuning needs besides them; see `training.tuning`."""
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


TrainStep = Callable[..., tuple[TrainState, StepMetrics]]


def init_train_state(config: Config, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step, initialized from ``config.train.seed``.

    Raises:
      ValueError: there are pipeline stages, and the layers differ.
    """
    model_key, dropout_key = jax.random.split(jax.random.key(config.train.seed))
    graph, params = init_model(config, model_key)
    tuned = init_tuned(config, graph, params)
    carried: ModelState = ()
    if config.data.mode == "stream":
        carried = nnx.merge(graph, params).initial_state(config.data.batch_size)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        tuned=tuned,
        opt_state=optimizer.init(trained_part(params, tuned)),
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


def batch_shardings(mesh: Mesh) -> Batch | None:
    """Return the shardings of a batch's arrays; None on one device."""
    return named_shardings(batch_specs(mesh), mesh) if is_distributed(mesh) else None


def init_model(config: Config, key: jax.Array) -> Initialized:
    """Initialize the model for training: rematerialized, and stacked if there are stages."""
    return initialize(
        config.model, key, remat=config.train.remat, stack_layers=config.mesh.pipeline > 1
    )


def abstract_train_model(config: Config) -> Initialized:
    """Return graphdef and abstract parameters of `init_model`."""
    abstract: Initialized = jax.eval_shape(lambda: init_model(config, jax.random.key(0)))
    return abstract


def choose_microbatches(config: Config, mesh: Mesh | None) -> Config:
    """Return the configuration with ``train.gradient_accumulation`` set, where it is None.

    On a single CPU device, it is the divisor of ``data.batch_size`` whose microbatches come
    closest, by their ratio, to 1,024 tokens; elsewhere 1. As this depends on sizes alone, results
    are bitwise independent of the number of cores.
    """
    if config.train.gradient_accumulation is not None:
        return config
    size, microbatches = config.data.batch_size, 1
    if is_on_cpu(mesh) and not is_distributed(mesh):
        length = config.train.bptt_window or config.data.sequence_length
        divisors = [n for n in range(1, min(size, _MAX_SEQUENCES) + 1) if size % n == 0]
        ratios = {n: abs(math.log(n * length / _MICROBATCH_TOKENS)) for n in [*divisors, size]}
        microbatches = size // min(ratios, key=ratios.__getitem__)
    train = dataclasses.replace(config.train, gradient_accumulation=microbatches)
    return dataclasses.replace(config, train=train)


def make_grad_fn(config: Config) -> Callable[..., tuple[jax.Array, jax.Array, Any, ModelState]]:
    """Build the loss and gradient function of a batch.

    It maps ``(weights, batch, carried, rng, step)`` to ``(loss, predictions, gradient, carried)``;
    `weights` are the parameters and a learned initial state, or (); `rng` is raw uint32 key data,
    `step` int32. With ``train.bptt_window``, the batch is split by `split_into_windows`;
    ``train.gradient_accumulation`` None means 1. The loss is the mean over all predictions, in
    nats. Gradients of what ``train.tune`` does not need are 0. Inside `jax.shard_map`, arguments
    and results are this device's shards, but loss and predictions are global.
    """
    graph, _ = abstract_train_model(config)
    dropout = config.model.dropout > 0

    def loss_fn(
        weights: Any, batch: Batch, carried: ModelState, key: jax.Array, predictions: jax.Array
    ) -> tuple[jax.Array, ModelState]:
        """Sum over the batch, divided by `predictions`: losses of parts add up to a mean."""
        params, initial = weights
        model = nnx.merge(graph, stop_gradients(config.train.tune, params))
        if initial:
            carried = carried or model.initial_state(len(batch.tokens))
        hidden, carried = model.hidden_states(
            batch.tokens,
            model.reset_states(carried, batch.reset, initial or None) if carried else None,
            shard_segment_ids(jnp.asarray(batch.segment_ids)),
            dropout_key=key if dropout else None,
        )
        losses = chunked_cross_entropy(model.logits, hidden, batch.targets, batch.loss_mask)
        nll = jnp.sum(losses)
        return nll / predictions.astype(nll.dtype), carried

    if not config.train.bptt_window:
        grad_fn = _value_and_grad(loss_fn)
    elif config.train.bptt == "truncated":
        # Each window starts from the final state of the previous one, as a constant (Williams and
        # Peng 1990).
        grad_fn = _sum_over_windows(_value_and_grad(loss_fn), loss_fn, _zero_gradient)
    else:
        # The forward pass saves the state before each window; the backward pass recomputes one
        # window at a time. In a scan, XLA cannot merge the two.
        remat_loss_fn = jax.checkpoint(loss_fn, prevent_cse=False)
        grad_fn = _value_and_grad(_sum_over_windows(remat_loss_fn, loss_fn, _zero_loss))
    grad_fn = _sum_over_microbatches(grad_fn, config.train.gradient_accumulation or 1)

    def batch_grad_fn(
        weights: Any, batch: Any, carried: ModelState, rng: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, jax.Array, Any, ModelState]:
        predictions = psum(jnp.sum(batch.loss_mask), *TOKEN_AXES)
        key = _fold_in_device(jax.random.fold_in(jax.random.wrap_key_data(rng), step))
        # Cast to varying, so that their gradients are summed over devices once, after all
        # microbatches.
        varying_weights = jax.tree.map(lambda weight: vary_like(weight, *batch), weights)
        divisor = jnp.maximum(predictions, 1)
        (loss, gradient), final = grad_fn(varying_weights, batch, carried, key, divisor)
        carried = final if carried else ()
        return psum(loss, *TOKEN_AXES), predictions, _sum_over_replicas(gradient, weights), carried

    return batch_grad_fn


_PartFn = Callable[..., tuple[Any, ModelState]]
"""Function of part of a batch: ``(weights, batch, carried, dropout_key, predictions)`` to ``(value,
carried)``. The value is a loss, or a loss and its gradient. `carried` is the recurrent state before
the part, or () for none. `dropout_key` is a typed PRNG key, `predictions` an int32 scalar of at
least 1."""


def _value_and_grad(loss_fn: _PartFn) -> _PartFn:
    """Return the gradient function of a loss, with `stop_gradient` on the carried state."""

    def grad_fn(params: nnx.State, batch: Batch, carried: ModelState, *rest: Any) -> Any:
        carried = jax.lax.stop_gradient(carried)
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, carried), gradient = value_and_grad(params, batch, carried, *rest)
        return (loss, gradient), carried

    return grad_fn


def split_into_windows(batch: Batch, window: int) -> Batch:
    """Split a batch ``[B, T]`` into BPTT windows ``[B, T / window, window]``; `window` divides T.

    `reset` becomes ``[B, T / window]`` bool: True where a window's first token starts a segment.
    """
    arrays: Any = batch
    begins = segment_starts(arrays.segment_ids)[:, ::window].at[:, 0].set(arrays.reset)
    return Batch._make([*(x.reshape(x.shape[0], -1, window) for x in arrays[:4]), begins])


def _sum_over_windows(
    window_fn: _PartFn, loss_fn: _PartFn, zero: Callable[[nnx.State, Batch], Any]
) -> _PartFn:
    """Sum a function over the windows of `split_into_windows`, in the memory that one needs.

    `loss_fn` gives the shape of the state, and `zero` the sum before the first window.
    """

    def summed_fn(
        params: nnx.State, batch: Batch, carried: ModelState, key: jax.Array, predictions: jax.Array
    ) -> Any:
        def add(sums_and_carried: Any, numbered: Any) -> tuple[Any, None]:
            (sums, carried), (index, window) = sums_and_carried, numbered
            key_of_window = jax.random.fold_in(key, index)
            new, carried = window_fn(params, window, carried, key_of_window, predictions)
            return (jax.tree.map(jnp.add, sums, new), carried), None

        sums = zero(params, batch)
        windows = jax.tree.map(lambda x: x.swapaxes(0, 1), batch)
        first = jax.tree.map(lambda x: x[0], windows)
        _, ends = jax.eval_shape(loss_fn, params, first, carried, key, predictions)
        carried = carried or jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), ends)
        carried = jax.tree.map(vary_like, carried, ends)
        indices = jnp.arange(windows.reset.shape[0])
        return jax.lax.scan(add, (sums, carried), (indices, windows))[0]

    return summed_fn


def _sum_over_microbatches(grad_fn: _PartFn, num_microbatches: int) -> _PartFn:
    """Sum losses and gradients over microbatches ``[B / num_microbatches, ...]`` of a batch.

    Microbatch i has the dropout key ``fold_in(dropout_key, i)``.
    """
    if num_microbatches == 1:
        return grad_fn

    def summed_fn(
        params: nnx.State, batch: Batch, carried: ModelState, key: jax.Array, predictions: jax.Array
    ) -> Any:
        def add(sums: Any, microbatch: Any) -> tuple[Any, ModelState]:
            index, sequences, carried = microbatch
            microbatch_key = jax.random.fold_in(key, index)
            new, carried = grad_fn(params, sequences, carried, microbatch_key, predictions)
            return jax.tree.map(jnp.add, sums, new), carried

        microbatches = jax.tree.map(
            lambda x: x.reshape(num_microbatches, -1, *x.shape[1:]), (batch, carried)
        )
        sums = _zero_gradient(params, batch)
        sums, carried = jax.lax.scan(add, sums, (jnp.arange(num_microbatches), *microbatches))
        return sums, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), carried)

    return summed_fn


def _zero_loss(_: nnx.State, batch: Any) -> jax.Array:
    return vary_like(jnp.zeros(()), *batch)


def _zero_gradient(params: nnx.State, batch: Any) -> tuple[jax.Array, nnx.State]:
    zeros = jax.tree.map(lambda param: vary_like(jnp.zeros_like(param), param), params)
    return _zero_loss(params, batch), zeros


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
    config: Config,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
    with_steps: bool = False,
) -> TrainStep:
    """Return the train step, which compiles at its first call and donates the old state.

    A step whose loss or gradient is not finite only advances the counters.

    Args:
      config: the run's configuration.
      optimizer: result of `make_optimizer`.
      mesh: the devices; None, or a mesh of size 1, runs on the default device. State and batch are
        sharded by `state_specs` and `batch_specs`.
      with_steps: whether the step takes a third argument, the ``steps`` of `make_optimizer`.

    Raises:
      ValueError: there are pipeline stages, and the layers differ.
    """
    config = choose_microbatches(config, mesh)
    grad_fn, window = make_grad_fn(config), config.train.bptt_window
    optimizer = optax.with_extra_args_support(optimizer)
    options: dict[str, Any] = {}
    if is_distributed(mesh):
        state, batch = state_specs(config, optimizer, mesh), batch_specs(mesh)
        grad_batch = batch
        if window:  # [B, T / window, window]: the tokens of each window are sharded
            token_specs: Any = [P(spec[0], None, spec[1]) for spec in batch[:4]]
            grad_batch = Batch._make([*token_specs, batch.reset])
        weights = (state.params, state.tuned.get("initial", ()))
        grad_fn = jax.shard_map(
            grad_fn,
            mesh=mesh,
            in_specs=(weights, grad_batch, state.carried, P(), P()),
            out_specs=(P(), P(), weights, state.carried),
        )
        states = named_shardings(state, mesh)
        replicated = NamedSharding(mesh, P())
        schedule = [replicated] * with_steps
        options["in_shardings"] = (states, named_shardings(batch, mesh), *schedule)
        options["out_shardings"] = (states, replicated)
    if is_on_cpu(mesh) and (is_distributed(mesh) or config.train.remat != "none"):
        # XLA of jax 0.10 removes the barriers of `jax.checkpoint` on CPUs before its last
        # common-subexpression elimination (CSE), which would merge intended re-gathers and
        # recomputation.
        options["compiler_options"] = {"xla_disable_hlo_passes": "cse_barrier_expander"}

    def train_step(
        state: TrainState, batch: Batch, *steps: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        if "initial" in state.tuned:
            # A document that begins within a sequence starts from zero, not from the learned state.
            is_first = batch.segment_ids == batch.segment_ids[:, :1]
            batch = batch._replace(loss_mask=batch.loss_mask & is_first)
        batch = split_into_windows(batch, window) if window else batch

        def weights_of(trained: Any) -> tuple[Any, ModelState]:
            params, tuned = with_trained(state.params, state.tuned, trained)
            return params, tuned.get("initial", ())

        weights, pull_back = jax.vjp(weights_of, trained_part(state.params, state.tuned))
        loss, predictions, gradient, carried = grad_fn(
            weights, batch, state.carried, state.rng, state.step
        )
        (gradient,) = pull_back(gradient)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        def update(old: Any) -> Any:
            params, tuned, opt_state, _ = old
            trained = trained_part(params, tuned)
            # If this branch computed the norm again, its last bits would depend on the number of
            # threads.
            extra = {"norm": norm} | ({"steps": steps[0]} if with_steps else {})
            updates, opt_state = optimizer.update(gradient, opt_state, trained, **extra)
            trained = optax.apply_updates(trained, updates)
            return *with_trained(params, tuned, trained), opt_state, carried

        # `cond`, not `where`, which would copy the old state.
        old = (state.params, state.tuned, state.opt_state, state.carried)
        params, tuned, opt_state, new_carried = jax.lax.cond(finite, update, lambda old: old, old)
        skipped = 1 - finite.astype(jnp.int32)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            tuned=tuned,
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


def check_memory(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> None:
    """Raise `UserError` if the train step does not fit in memory, before anything is allocated.

    By an estimate, and by XLA's memory analysis if the estimate is a quarter of device memory or
    more.
    """
    config = choose_microbatches(config, mesh)
    if memory_estimate.check_training(config, mesh) < ANALYSIS_THRESHOLD:
        return
    step: Any = make_train_step(config, optimizer, mesh, with_steps=True)
    state = jax.eval_shape(lambda: init_train_state(config, optimizer))
    shape = (config.data.batch_size, config.data.sequence_length)
    ids, mask = jax.ShapeDtypeStruct(shape, np.int32), jax.ShapeDtypeStruct(shape, bool)
    batch = Batch(ids, ids, mask, ids, jax.ShapeDtypeStruct(shape[:1], bool))  # type: ignore[arg-type]
    # The first step takes this program from the compilation cache.
    steps = jax.ShapeDtypeStruct((2,), np.int32)
    sizes = step.lower(state, batch, steps).compile().memory_analysis()
    if sizes is not None:
        needed = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
        memory_estimate.check_program(needed, mesh)
