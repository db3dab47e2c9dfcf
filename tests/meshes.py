"""Meshes of simulated devices, shared by the tests of what runs on them."""

import math

import chex
import jax
import numpy as np

from simplernn_jax.config import MeshConfig
from simplernn_jax.sharding.mesh import make_mesh


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
