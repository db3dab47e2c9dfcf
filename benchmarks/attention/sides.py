"""What is compared: `base` with its recurrence, and with attention over the whole row."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from benchmarks.jax_steps import CompiledStep, load_config, our_step, scan_step
from simplernn_jax.config import Config
from simplernn_jax.ops import gated_linear_recurrence, native
from simplernn_jax.ops.chunkwise import choose_chunk_size

RECURRENCE, ATTENTION = "SimpleRNN", "attention"
SIDES = (RECURRENCE, ATTENTION)
LAYERS = 4
"""Of `base`."""
_CONFIGS = {RECURRENCE: "base", ATTENTION: "attention"}


def config_of(side: str, length: int, batch: int = 1, **model: Any) -> Config:
    """`base` with this mixer, as many parameters on both sides; attention sees whole rows."""
    return load_config(_CONFIGS[side], batch, length, attention_context=length, **model)


def chunk_step(config: Config) -> CompiledStep:
    """The train step, the recurrence in chunks whatever the machine would choose."""
    chunk = choose_chunk_size(config.data.sequence_length)
    return our_step(config, functools.partial(gated_linear_recurrence, chunk_size=chunk))


@contextlib.contextmanager
def all_in_jax() -> Iterator[None]:
    """While a model is traced inside, it calls no function in C, as on a machine without a
    compiler: the recurrence goes in chunks, and all that is computed can be counted."""
    with mock.patch.object(native, "has_native_functions", return_value=False):
        yield


PROGRAMS: dict[str, tuple[str, Callable[[Config], CompiledStep]]] = {
    "attention": (ATTENTION, our_step),
    "scan": (RECURRENCE, scan_step),
    "chunks": (RECURRENCE, chunk_step),
    "ours": (RECURRENCE, our_step),
}
"""Ways to take a train step: whose, and how. `ours` is what training runs."""
