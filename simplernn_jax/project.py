"""Folder of the scripts and configurations, and how their users start a script.

That folder is the root of a checkout, or this package if it was installed from a wheel.
"""

import os
import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
IS_CHECKOUT = not (PACKAGE / "configs").is_dir()
ROOT = PACKAGE.parent if IS_CHECKOUT else PACKAGE

COMMAND = "_SIMPLERNN_JAX_COMMAND"
"""Environment variable: id of the process that the command ``simplernn`` has started."""


def started_as_command() -> bool:
    """Return whether users of this process start scripts by ``simplernn NAME``."""
    return not IS_CHECKOUT or os.environ.get(COMMAND) == str(os.getpid())


def name_commands(text: str) -> str:
    """Name scripts and configurations in a text the way that its reader gives them.

    ``python scripts/train.py`` becomes ``simplernn train`` and ``configs/base.py`` becomes ``base``
    for those who use that command, and ``pip install -e '.[serve]'`` names the distribution where
    it was installed from a wheel.
    """
    if started_as_command():
        text = re.sub(r"\b(?:python|bash) scripts/(\w+)\.(?:py|sh)\b", r"simplernn \1", text)
        text = re.sub(r"(?<![\w/])configs/(\w+)\.py\b", r"\1", text)
    if not IS_CHECKOUT:
        text = re.sub(r"pip install -e '\.\[(\w+)\]'", r"pip install 'simplernn_jax[\1]'", text)
    return text


def usage() -> str:
    """Return the beginning of this process's command line."""
    script = Path(sys.argv[0])
    return f"simplernn {script.stem}" if started_as_command() else f"python {script}"
