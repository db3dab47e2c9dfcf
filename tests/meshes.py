"""Meshes of simulated devices, shared by the tests of what runs on them."""

import math

import jax

from simplernn_jax.config import MeshConfig
from simplernn_jax.sharding.mesh import make_mesh


def mesh_of(**sizes):
    """A mesh of as many devices as `sizes` make up."""
    sizes = {"data": 1} | sizes
    return make_mesh(MeshConfig(**sizes), jax.devices("cpu")[: math.prod(sizes.values())])
