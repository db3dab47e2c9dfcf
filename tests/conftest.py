"""Strict settings for every test; they are in place before JAX is first used."""

import collections
import functools
import gc
import itertools
import math
import os
import platform
import sys
import threading
import zlib
from importlib.metadata import version

# Replaces a user's flags, which would change rounding and fusion. Tests spend most of their time
# compiling, and unoptimized code suffices for small arrays.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
if "DEFAULT_XLA_FLAGS" in os.environ:  # set by scripts/test.sh --all for some of the tests
    os.environ["XLA_FLAGS"] = ""
elif version("jaxlib").startswith("0.10."):  # a third of the time; later ones lack the choice
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"  # 6 % of the time
elif platform.machine() == "x86_64":  # 6 % of the time of compilation
    os.environ["XLA_FLAGS"] += " --xla_cpu_max_isa=AVX2"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# PyTorch's threads wait for each other in loops, while other workers need the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import jax
import jaxtyping
import numpy as np
import pytest
from absl import flags

if version("jaxlib").startswith("0.10."):  # later ones share contexts: 7 % of the time
    from jax._src.interpreters import mlir

    _make_context = mlir.make_ir_context
    _shared_context = functools.lru_cache(8)(lambda thread, number: _make_context())
    _programs = itertools.count()
    mlir.make_ir_context = lambda: _shared_context(threading.get_ident(), next(_programs) // 100)

if sys.version_info < (3, 12):  # the checks take an eighth of the time of tests
    import beartype
    from jax import export

    (_OPEN_SIZE,) = export.symbolic_shape("size")
    check = beartype.beartype(
        conf=beartype.BeartypeConf(
            is_pep484_tower=True,  # an int is a float too, as for type checkers of source
            # The size of an axis is an int, unless an exported program leaves it open. NumPy's
            # integers count: of a sequence only one item, drawn at random, is checked.
            hint_overrides=beartype.FrozenDict({int: int | np.integer | type(_OPEN_SIZE)}),
        )
    )
    # Annotations of these are checked at every call; nothing may have imported them before.
    jaxtyping.install_import_hook(
        [
            "simplernn_jax.analysis",
            "simplernn_jax.inference.decode",
            "simplernn_jax.inference.engine",
            "simplernn_jax.inference.sampling",
            "simplernn_jax.models",
            "simplernn_jax.ops",
            "simplernn_jax.parallel",
            "simplernn_jax.training.losses",
        ],
        f"{__name__}.check",
    )


class _RaisesUnchecked(pytest.RaisesExc):
    """``pytest.raises`` without these checks, which would come before the package's own error."""

    def __enter__(self):
        jaxtyping.config.update("jaxtyping_disable", True)
        return super().__enter__()

    def __exit__(self, *error):
        jaxtyping.config.update("jaxtyping_disable", False)
        return super().__exit__(*error)


pytest.raises = _RaisesUnchecked

# Broadcasting between ranks must be explicit, and casts between dtypes.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Meshes are tested on eight devices; everything else runs on the first.
jax.config.update("jax_num_cpu_devices", 8)

# Grain reads absl flags, which nothing parses under pytest.
flags.FLAGS.mark_as_parsed()

# The same examples at every run, so that failures are reproducible.
hypothesis.settings.register_profile("project", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("project")


@pytest.fixture(scope="module")
def chat_workdir(tmp_path_factory):
    """Workdir of an untrained chat model."""
    from small_runs import save_untrained_chat

    return save_untrained_chat(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def server(chat_workdir):
    """A server of `chat_workdir`; a module may have another one."""
    from processes import serving

    with serving(chat_workdir, "--slots=3") as process:
        yield process


@pytest.fixture(scope="module")
def client(server):
    """OpenAI's client of `server`."""
    import openai

    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


LONGEST = ("test_docs", "test_many_processes", "test_conversation", "test_tuning", "test_wheel")
"""Files that start first, so that no process has one of them left when the other has ended."""
OLDEST = ("analysis", "benchmarks", "scripts")
"""Folders of tests for Python 3.11 only, as if each was marked ``oldest_python``."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    if sys.version_info >= (3, 12):
        others = _other_cases(items)
        for item in items:
            is_oldest = item.path.parent.name in OLDEST or item.get_closest_marker("oldest_python")
            if is_oldest or item in others:
                item.add_marker(pytest.mark.skip(reason="only on 3.11: see CONTRIBUTING.md"))


def _other_cases(items):
    """Three quarters of the cases of every test, spread over its parameters by a hash."""
    cases = collections.defaultdict(list)
    for item in sorted(items, key=lambda item: zlib.crc32(item.name.encode())):
        cases[item.path, item.originalname].append(item)
    return {item for each in cases.values() for item in each[math.ceil(len(each) / 4) :]}


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # garbage collections during tracing skip the libraries,
    gc.set_threshold(200_000, 50, 100)  # and are rare: 5 % of the time


def pytest_sessionfinish():
    gc.collect()  # reports what finalizers raise
    gc.freeze()  # pytest collects twice more, 3 s each


@pytest.fixture(scope="session", autouse=True)
def _caches(request):
    """Keep compiled C code and programs for the next run, out of the user's cache."""
    from simplernn_jax.cli.compilation_cache import use_compilation_cache

    os.environ["XDG_CACHE_HOME"] = str(request.config.cache.mkdir("scripts"))  # of the scripts
    folder = request.config.cache.mkdir("programs")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    use_compilation_cache()
