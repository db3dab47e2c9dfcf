"""Strict settings for every test; they are in place before JAX is first used."""

import os

# In place of a user's flags, which would change rounding and fusion. Most of the time of a test is
# that of compiling, and machine code as it comes does for small arrays.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest
from absl import flags

# Shapes of different rank meet only where that is written down.
jax.config.update("jax_numpy_rank_promotion", "raise")

# Meshes are tested on eight devices; all else runs on the first of them.
jax.config.update("jax_num_cpu_devices", 8)

# Grain asks absl for its flags, which nothing parses under pytest.
flags.FLAGS.mark_as_parsed()

# The same examples at every run: a failure is one that everybody can see.
hypothesis.settings.register_profile("project", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("project")


@pytest.fixture(scope="session", autouse=True)
def _compiled_programs(tmp_path_factory):
    """Compiled code and programs of the tests, and of scripts that they start, lie apart from the
    user's own."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
