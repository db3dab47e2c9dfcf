"""The layers of a model: a list, or stacked parameters to be sharded over pipeline stages."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from simplernn_jax.array_types import (
    Activations,
    LogicalAxes,
    ModelState,
    SegmentIds,
    TimeShardActivations,
)
from simplernn_jax.models.blocks import PlainBlock
from simplernn_jax.ops.checks import check_batch
from simplernn_jax.parallel.collectives import axis_size
from simplernn_jax.parallel.named_leaves import STACKED
from simplernn_jax.parallel.pipeline import choose_num_chunks, run_pipeline


def rematerialize(layer: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """Wrap `layer`, which is called with arrays and None only, for its backward pass.

    With the policy ``none`` it saves all residuals; with ``block`` it saves the layer's inputs and
    recomputes the rest.
    """
    if policy == "none":
        return layer

    def call(*inputs: Any) -> Any:  # a new function: JAX caches traces, and layers are mutable
        return layer(*inputs)

    return jax.checkpoint(call)


class LayerList(nnx.List[PlainBlock]):
    """Layers that run one after the other; the state is a tuple of theirs."""

    def initial_state(self, batch_size: int) -> ModelState:
        """Return the state before the first token."""
        return tuple(layer.initial_state(batch_size) for layer in self)

    def state_axes(self) -> ModelState:
        """Return the logical axes of each array of the state."""
        return tuple(layer.state_axes() for layer in self)

    def __call__(
        self,
        x: Activations,
        state: ModelState | None,
        segment_ids: SegmentIds | None,
        dropout_key: jax.Array | None = None,
        remat: str = "none",
    ) -> tuple[Activations, ModelState]:
        """Apply all layers to a sequence; arguments and errors as in `LanguageModel.__call__`."""
        if state is None:
            state = (None,) * len(self)
        found = len(state) if isinstance(state, list | tuple) else type(state).__name__
        if found != len(self):
            raise ValueError(
                f"state: expected a tuple of {len(self)} layer states (see `initial_state`); "
                f"got {found}"
            )
        check_batch("state", state, x.shape[0])
        states = []
        for index, (layer, layer_state) in enumerate(zip(self, state, strict=True)):
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            x, layer_state = rematerialize(layer, remat)(x, layer_state, segment_ids, key)
            states.append(layer_state)
        return x, tuple(states)


class LayerStack(nnx.Module):
    """Layers of equal structure, whose parameters are stacked along a leading axis of layers.

    On a mesh with an axis ``pipeline`` each device holds its shard of that axis, and a call runs
    all layers as a pipeline (`parallel.pipeline`). Outside `jax.shard_map` it can be initialized,
    not called.
    """

    def __init__(self, layers: Sequence[Any]):
        """Stack the parameters of `layers`; raises ValueError if they differ in mixer or shapes."""
        graphs, params = zip(*(nnx.split(layer, nnx.Param) for layer in layers), strict=True)
        shapes = [jax.tree.map(jnp.shape, one) for one in params]
        for index in range(1, len(layers)):
            if graphs[index] != graphs[0] or shapes[index] != shapes[0]:
                raise ValueError(f"layers: layer {index} differs from layer 0 (mixer or shapes)")
        self.num_layers = len(layers)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
        for param in jax.tree.leaves(stacked, is_leaf=lambda x: isinstance(x, nnx.Param)):
            param.set_metadata("axes", LogicalAxes("layers", *param.get_metadata("axes", ())))
        self.stacked = nnx.merge(graphs[0], stacked)

    def initial_state(self, batch_size: int) -> ModelState:
        """Return the zero state of all layers, leaves ``[B, num_layers, ...]``."""
        return {
            STACKED: jax.tree.map(
                lambda leaf: jnp.stack([leaf] * self.num_layers, axis=1),
                self.stacked.initial_state(batch_size),
            )
        }

    def state_axes(self) -> ModelState:
        """Return the logical axes of each array of the state."""

        def stacked(axes: LogicalAxes) -> LogicalAxes:
            return LogicalAxes(axes[0], "layers", *axes[1:])

        return {STACKED: jax.tree.map(stacked, self.stacked.state_axes())}

    def __call__(
        self,
        x: Activations,
        state: ModelState | None,
        segment_ids: SegmentIds | None,
        dropout_key: jax.Array | None = None,
        remat: str = "none",
    ) -> tuple[TimeShardActivations, ModelState]:
        """Apply all layers to a sequence.

        Args:
          x: ``[B, T, D]``, on every stage.
          state: this stage's shard of `initial_state`, leaves ``[B, num_layers / stages, ...]``,
            before the first token; None starts from zero.
          segment_ids: ``[B, T]``; a change of id resets the state to zero.
          dropout_key: PRNG key of dropout; None disables it.
          remat: policy of `rematerialize` for each layer.

        Returns:
          This stage's time shard, ``[B, T / stages, D]``, and the state after the last token.

        Raises:
          ValueError: a state of another batch size, or a call outside `jax.shard_map` with an axis
            ``pipeline``.
        """
        if state is not None:
            check_batch("state", state, x.shape[0])
        if "pipeline" not in jax.sharding.get_abstract_mesh().manual_axes:
            raise ValueError("stacked layers run only inside jax.shard_map with an axis `pipeline`")
        graph, params = nnx.split(self.stacked, nnx.Param)
        if segment_ids is None:
            segment_ids = jnp.zeros(x.shape[:2], jnp.int32)

        def layer(
            params: nnx.State, x: Activations, state: Any, ids: SegmentIds, key: jax.Array | None
        ) -> tuple[Activations, Any]:
            module = nnx.merge(graph, params)
            return rematerialize(module, remat)(x, state, ids, key)

        x, stacked = run_pipeline(
            layer,
            params,
            x,
            None if state is None else state[STACKED],
            segment_ids,
            chunks=choose_num_chunks(x.shape[1], axis_size("pipeline")),
            dropout_key=dropout_key,
        )
        return x, {STACKED: stacked}
