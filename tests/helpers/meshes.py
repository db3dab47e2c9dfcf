"""Meshes of simulated devices and train steps on them, shared by the tests of what runs there."""

import math

import chex
import jax
import numpy as np

from benchmarks.train_steps import take_steps
from simplernn_jax.config import MeshConfig
from simplernn_jax.parallel.mesh import make_mesh
from simplernn_jax.parallel.named_leaves import in_layout_of
from simplernn_jax.training.train_step import init_train_state, make_train_step


def mesh_of(**sizes):
    """A mesh of as many devices as `sizes` make up."""
    sizes = {"data": 1} | sizes
    return make_mesh(MeshConfig(**sizes), jax.devices("cpu")[: math.prod(sizes.values())])


def distance(ours, reference):
    """Norm of all differences between two trees, relative to the norm of `reference`."""
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, reference)
    ours, reference = (
        np.concatenate([np.ravel(np.float64(leaf)) for leaf in jax.tree.leaves(tree)])
        for tree in (ours, reference)
    )
    return np.linalg.norm(ours - reference) / max(np.linalg.norm(reference), np.finfo(float).tiny)


def first_state(config, optimizer):
    """The state before the first step, as numpy arrays; floats are in the model's precision."""
    state = jax.device_get(jax.jit(lambda: init_train_state(config, optimizer))())
    wide = {np.dtype("float32"): config.model.precision}
    return jax.tree.map(lambda x: x.astype(wide.get(x.dtype, x.dtype)), state)


def compile_step(config, optimizer, mesh, state, batch):
    """The train step, and `state` as arrays of the layout that it takes."""
    shapes = jax.eval_shape(lambda: init_train_state(config, optimizer))
    state = in_layout_of(shapes, state)
    step = make_train_step(config, optimizer, mesh).lower(state, batch).compile()
    return step, jax.device_put(state, step.input_shardings[0][0])


def run_steps(step, state, batches):
    """Losses, and the state after the last batch as numpy arrays."""
    (states, on_mesh), _ = step.input_shardings
    copy = jax.device_put(jax.tree.map(np.array, jax.device_get(state)), states)  # to donate
    placed = (jax.device_put(batch, on_mesh) for batch in batches)
    state, metrics = take_steps(step, copy, placed)
    return [float(of_step.loss) for of_step in metrics], jax.device_get(state)
