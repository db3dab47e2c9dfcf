"""Recurrent language models in JAX: the SimpleRNN cell, its training and its decoding.

Among the public names, all of which docs/api.md lists, are `Config`, `load_config`, `train`,
`load_model`, `generate` and `generate_text` here; `gated_linear_recurrence` and `recurrent_step` in
`simplernn_jax.ops`; `SimpleRNNCell`, `SimpleRNN` and `LanguageModel` in `simplernn_jax.models`.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from simplernn_jax.cli.config_files import load_config as load_config
    from simplernn_jax.config import Config as Config
    from simplernn_jax.inference.decode import generate as generate
    from simplernn_jax.inference.loading import load_model as load_model
    from simplernn_jax.inference.text import generate_text as generate_text
    from simplernn_jax.training.loop import train as train
else:
    _MODULES = {
        "Config": "config",
        "load_config": "cli.config_files",
        "generate": "inference.decode",
        "generate_text": "inference.text",
        "load_model": "inference.loading",
        "train": "training.loop",
    }

    def __getattr__(name):
        """Import a public name at its first use: importing the package stays cheap."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
