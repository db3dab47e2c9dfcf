"""Plain C loops over weights, compiled here: the machine's limit of decoding."""

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from flax import nnx

from simplernn_jax.models import LanguageModel

from .measure import Call

# Sums in any order, so that they are vectorized. Not by -ffast-math: GCC then links code that
# makes the thread that loads the library flush subnormal numbers to zero, Python's included.
_ANY_ORDER = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math")
_OPTIONS = ("-O3", "-march=native", *_ANY_ORDER, "-shared", "-fPIC")


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    source = Path(__file__).with_name("plain_loops.c")
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/loops.so"
        subprocess.run([*compiler, *_OPTIONS, str(source), "-o", target], check=True)
        library = ctypes.CDLL(target)
    library.read_words.restype = ctypes.c_uint64
    return library


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def matrices_of(model: LanguageModel) -> list[np.ndarray]:
    """Matrices ``[out, in]`` of a token; a tied embedding counts as the head."""
    linears = [part for _, part in nnx.iter_graph(model) if isinstance(part, nnx.Linear)]
    matrices = [np.asarray(linear.kernel[...]).T for linear in linears]
    tied = [np.asarray(model.embedding.embedding[...])] if model.head is None else []
    return matrices + tied


def products_in_c(model: LanguageModel, num_tokens: int) -> Call:
    """Every matrix of the model times a vector, `num_tokens` times, in one thread."""
    matrices = matrices_of(model)
    sizes = np.asarray([matrix.shape for matrix in matrices], np.int64)
    weights = np.concatenate([np.ascontiguousarray(matrix).ravel() for matrix in matrices])
    x, y = np.ones((2, np.max(sizes)), np.float32)

    def call() -> np.ndarray:
        arguments = (ctypes.c_int64(len(sizes)), ctypes.c_int64(num_tokens))
        _library().multiply(
            _pointer(weights), _pointer(sizes), *arguments, _pointer(x), _pointer(y)
        )
        return y

    return call


def reading(num_bytes: int) -> Call:
    """Read `num_bytes` of memory once, by as many threads as there are cores."""
    count = os.cpu_count() or 1
    parts = np.array_split(np.ones(num_bytes // 8, np.uint64), count)
    pool = ThreadPoolExecutor(count)

    def read(part: np.ndarray) -> int:
        return int(_library().read_words(_pointer(part), ctypes.c_int64(len(part))))

    return lambda: sum(pool.map(read, parts))
