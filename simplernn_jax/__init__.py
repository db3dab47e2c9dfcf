"""Recurrent language models in JAX: the SimpleRNN cell, training and decoding.

Public names: `load_model` here; `gated_linear_recurrence` and `recurrent_step` in
`simplernn_jax.ops`; `SimpleRNNCell`, `SimpleRNN` and `LanguageModel` in
`simplernn_jax.models`; `generate` in `simplernn_jax.inference`.
"""

from __future__ import annotations  # scripts/bootstrap.py imports this under any Python

TYPE_CHECKING = False  # typing's own would cost every process milliseconds twice
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"


def load_model(workdir: str, checkpoint: str | int = "best") -> tuple[Any, Any, Any]:
    """Load a trained run: ``(model, tokenizer, config)``.

    The checkpoint is verified and restored; nothing in it is executed. Imports are deferred, so
    that importing the package is fast.

    Args:
      workdir: folder of a training run.
      checkpoint: ``best``, the lowest validation loss if all were evaluated on the same tokens,
        otherwise the newest; ``newest``; or a step.

    Raises:
      UserError: no such checkpoint, or none that is valid.
    """
    from simplernn_jax.checkpoint.checkpointer import load_model as load

    return load(workdir, checkpoint)
