"""Trains a language model, or goes on training one.

    python scripts/train.py --config configs/base.py --workdir runs/base
    python scripts/train.py --config configs/base.py --workdir runs/mine \
        --config.data.source=my_texts/ --config.train.steps=2000

The same command again resumes, byte for byte. SIGTERM and Ctrl-C save first and exit with
code 75; a second signal stops at once. Bad input is one line and code 2.
"""

import gc
import os

from absl import flags

from simplernn_jax import command_line
from simplernn_jax.errors import UserError

_CONFIG = command_line.define_config_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of checkpoints, metrics and tokenized text. Made if missing."
)


def main() -> int:
    """Trains; 0 at the end, `command_line.EXIT_INTERRUPTED` if a signal stopped it."""
    config = _CONFIG.value
    if not _WORKDIR.value:
        raise UserError("no --workdir: name a folder for the run, such as --workdir runs/mine")
    from simplernn_jax.compilation_cache import use_compilation_cache
    from simplernn_jax.training.loop import train

    use_compilation_cache()
    gc.freeze()  # what was imported stays: collections while a program is traced pass it by
    result = train(config, os.path.expanduser(_WORKDIR.value))
    return command_line.EXIT_INTERRUPTED if result.interrupted_by else 0


if __name__ == "__main__":
    command_line.run(main)
