"""Run an exported model in a separate process, as its users would load it.

python -m simplernn_jax.export.checking FORMAT FOLDER SCRATCH PARENT [PLUGIN ...]
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from simplernn_jax.devices import end_with_parent
from simplernn_jax.errors import UserError, one_line
from simplernn_jax.export.formats import find_format
from simplernn_jax.models.mixers.token_mixer import PLUGINS, load_plugin

TIMED_TOKENS = 128


class Found(NamedTuple):
    """Results of the exported model."""

    logits: np.ndarray
    """[T, vocab]."""
    ids: list[int]
    """Token ids of the text."""
    tokens_per_second: float


def run_exported(format_name: str, folder: Path, tokens: np.ndarray, text: str) -> Found:
    """Compute logits of [T] tokens and encode `text` by the model in `folder`, or `UserError`."""
    with tempfile.TemporaryDirectory() as scratch:
        np.save(Path(scratch, "tokens.npy"), tokens)
        Path(scratch, "text").write_bytes(text.encode())
        # An editable install leaves the name of its path hook in sys.path, which is no folder.
        path = os.pathsep.join(filter(os.path.isabs, sys.path))
        variables = {
            "PYTHONPATH": path,
            "JAX_PLATFORMS": "cpu",
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(Path(scratch, "modules")),
        }
        arguments = [format_name, str(folder), scratch, str(os.getpid()), *PLUGINS]
        result = subprocess.run(
            # -P: nothing is imported from the current folder.
            [sys.executable, "-P", "-m", __name__, *arguments],
            env={**os.environ, **variables},
            capture_output=True,
            check=False,
        )
        if result.returncode:
            reason = _reason(result.returncode, result.stderr.decode("utf-8", "replace"))
            raise UserError(
                f"--format={format_name}: the exported model fails in a fresh process: {reason}"
            )
        answer = json.loads(Path(scratch, "answer.json").read_text("utf-8"))
        return Found(np.load(Path(scratch, "logits.npy")), **answer)


def _reason(code: int, errors: str) -> str:
    if code < 0:
        advice = ", perhaps out of memory" if -code == signal.SIGKILL else ""
        return f"killed by signal {-code}{advice}"
    return one_line(errors.strip().rpartition("\n")[2]) or f"exit code {code}"


def main(format_name: str, folder: str, scratch: str, parent: str, *plugins: str) -> None:
    """Write what the model in `folder` computes to the folder `scratch`."""
    end_with_parent(int(parent))
    for plugin in plugins:
        load_plugin(plugin)
    loaded = find_format(format_name).load(Path(folder))
    tokens = np.load(Path(scratch, "tokens.npy"))
    np.save(Path(scratch, "logits.npy"), loaded.logits(tokens))
    ids = loaded.encode(Path(scratch, "text").read_bytes().decode())
    loaded.greedy(int(tokens[0]), TIMED_TOKENS)  # compiles
    start = time.perf_counter()
    loaded.greedy(int(tokens[0]), TIMED_TOKENS)
    rate = TIMED_TOKENS / (time.perf_counter() - start)
    answer = json.dumps({"ids": ids, "tokens_per_second": rate})
    Path(scratch, "answer.json").write_text(answer, "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
