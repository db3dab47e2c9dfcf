"""Strict settings for every test; they are in place before JAX is first used."""

import os

# Replaces a user's flags, which would change rounding and fusion. Tests spend most of their time
# compiling, and unoptimized code suffices for small arrays.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import jaxtyping
import pytest
from absl import flags

# Annotated shapes and dtypes of arrays are checked at every call of these modules.
jaxtyping.install_import_hook(
    [
        f"simplernn_jax.{name}"
        for name in (
            "analysis",
            "inference.decode",
            "inference.programs",
            "inference.sampling",
            "models",
            "ops",
            "sharding",
            "training.losses",
        )
    ],
    "annotation_checks.check",
)

# Broadcasting between ranks must be explicit.
jax.config.update("jax_numpy_rank_promotion", "raise")

# So must be conversion between dtypes.
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Meshes are tested on eight devices; everything else runs on the first.
jax.config.update("jax_num_cpu_devices", 8)

# Grain reads absl flags, which nothing parses under pytest.
flags.FLAGS.mark_as_parsed()

# The same examples at every run, so that failures are reproducible.
hypothesis.settings.register_profile("project", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("project")


class _Raises:
    """`pytest.raises`, inside which array annotations are not checked: our own checks must raise."""

    def __init__(self, *args, **kwargs):
        self._raises = _pytest_raises(*args, **kwargs)

    def __enter__(self):
        self._was_disabled = jaxtyping.config.jaxtyping_disable
        jaxtyping.config.update("jaxtyping_disable", True)
        return self._raises.__enter__()

    def __exit__(self, *error):
        jaxtyping.config.update("jaxtyping_disable", self._was_disabled)
        return self._raises.__exit__(*error)


_pytest_raises, pytest.raises = pytest.raises, _Raises


@pytest.fixture(scope="session", autouse=True)
def _compiled_programs(tmp_path_factory):
    """Keep compiled code of the tests and their scripts out of the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
