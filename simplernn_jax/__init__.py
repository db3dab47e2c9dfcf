"""Recurrent language models in JAX: the SimpleRNN cell, its training and its decoding.

Among the public names, all of which docs/api.md lists, are `load_model` here;
`gated_linear_recurrence` and `recurrent_step` in `simplernn_jax.ops`; `SimpleRNNCell`, `SimpleRNN`
and `LanguageModel` in `simplernn_jax.models`; `generate` in `simplernn_jax.inference`; the
configurations in `simplernn_jax.configs`.
"""

import os
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# A wheel has configs, scripts and benchmarks inside the package; in a checkout they are beside it.
if not os.path.isdir(os.path.join(__path__[0], "configs")):
    __path__.append(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

if TYPE_CHECKING:
    from simplernn_jax.inference.loading import load_model as load_model
else:

    def __getattr__(name):
        """Import `load_model` at its first use: importing the package stays cheap."""
        if name == "load_model":
            from simplernn_jax.inference.loading import load_model

            return load_model
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
