"""Looks into a trained model while it reads a text, and writes a page about it.

    python scripts/explain.py --workdir runs/base --text "def main():" --out explained
    python scripts/explain.py --workdir runs/base --text_file story.txt --out explained

--out gets explain.html, which holds everything and opens offline, its pictures as PNG files, and
their numbers in explain.json, where weights of maps are rounded to the fourth digit of their head's
largest. The page opens with a summary in a few sentences, then shows how long the model remembers,
what its state is worth, what one prediction came from, and which earlier tokens every output is
made of. The text is read as one document; its tokens are counted from 1. Lines on standard error
say what is being computed.

Exits with code 1 if the parts of a layer's output do not make up the whole: those of its recurrence
or attention, and where the model computes in float32 those of the layer too.
"""

import bootstrap

if __name__ == "__main__":
    bootstrap.start()

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags, logging

from simplernn_jax import command_line
from simplernn_jax.errors import UserError, counted
from simplernn_jax.files import check_output, write_file

if TYPE_CHECKING:  # what takes long to import comes after the flags are known to be right
    from simplernn_jax.analysis import Explanation
    from simplernn_jax.data import TokenSplit

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the training run to look into.")
_CHECKPOINT = command_line.define_checkpoint_flag()
_CACHE_DIR, _SOURCE = command_line.define_corpus_flags()
_TEXT = flags.DEFINE_string("text", None, "Text to read.")
_TEXT_FILE = flags.DEFINE_string("text_file", None, "UTF-8 file to read; - is standard input.")
_OUT = flags.DEFINE_string("out", None, "Folder for the page; made where it is missing.")
_TOKEN = flags.DEFINE_integer(
    "token",
    None,
    "Token whose prediction is taken apart; without it, the one that gains most from the far past.",
)
_MAP_TOKENS = flags.DEFINE_integer(
    "map_tokens", 192, "Tokens on the maps, around --token.", lower_bound=8, upper_bound=1024
)

_OUTPUT = re.compile(r"explain\.(html|json)|[a-z_]+(\d+)?\.png")
"""Names of files that this script writes into --out."""


def main() -> int:
    """Explains the text with the chosen whole checkpoint of --workdir."""
    if not _WORKDIR.value:
        raise UserError("no --workdir: name the folder of a training run, such as runs/base")
    if not _OUT.value:
        raise UserError("no --out: name a folder for the page")
    if _TEXT.value is None and _TEXT_FILE.value is None:
        raise UserError("no --text: give a text to read, or a file of it with --text_file")
    out = Path(command_line.expand_path(_OUT.value, "out"))
    _check_out(out)
    text = command_line.read_text(_TEXT.value, _TEXT_FILE.value, name="text")
    workdir = command_line.expand_path(_WORKDIR.value, "workdir")
    from simplernn_jax import load_model
    from simplernn_jax.analysis import explain
    from simplernn_jax.checkpoint.checkpointer import read_config
    from simplernn_jax.compilation_cache import use_compilation_cache
    from simplernn_jax.devices import check_devices

    check_devices()
    use_compilation_cache()
    model, tokenizer, config = load_model(workdir, _CHECKPOINT.value)
    out.mkdir(parents=True, exist_ok=True)
    explanation = explain(
        model,
        tokenizer,
        config,
        text,
        token=_TOKEN.value,
        map_tokens=_MAP_TOKENS.value,
        validation=_validation_split(workdir),
        report=logging.info,
    )
    logging.info("drawing ...")
    sizes = config.model
    facts = {
        "model": f"{counted(sizes.num_layers, 'layer')} of width {sizes.hidden_dim}, "
        f"{counted(sizes.num_heads, 'head')}",
        "checkpoint": f"step {read_config(workdir, _CHECKPOINT.value)[2]:,} of {_WORKDIR.value}",
    }
    page = _write(out, explanation, facts)
    is_exact = _print_errors(explanation, sizes.precision == sizes.state_precision == "float32")
    print(f"evaluated on {explanation.state_value.evaluated}")
    print(f"page: {page}")
    return 0 if is_exact else 1


def _check_out(out: Path) -> None:
    """Refuses at once what would fail when all has been computed."""
    if os.path.lexists(out):
        if not out.is_dir():
            raise UserError(f"--out={_OUT.value}: not a folder; name one")
        for name in filter(_OUTPUT.fullmatch, os.listdir(out)):
            try:
                check_output(out / name)
            except OSError as error:
                raise UserError(
                    f"--out={_OUT.value}: {name} in it cannot be replaced ({error.strerror}); "
                    "remove it or name another folder"
                ) from error
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--out={_OUT.value}: {nearest} cannot be written; name a folder that can")


def _validation_split(workdir: str) -> "TokenSplit | None":
    """The run's held-out text, or None where it has none or lost it."""
    from simplernn_jax.training.preparation import open_saved_corpus

    try:
        return open_saved_corpus(
            workdir, cache_dir=_CACHE_DIR.value, source=_SOURCE.value
        ).validation
    except UserError as error:
        logging.warning("evaluating on the given text, however short: %s", error)
        return None


def _write(out: Path, explanation: "Explanation", facts: dict[str, str]) -> Path:
    """The pictures, the numbers and, last, the page; returns its path."""
    from simplernn_jax.analysis.export import to_numbers
    from simplernn_jax.analysis.gallery import draw_pictures
    from simplernn_jax.analysis.page import make_page

    pictures = draw_pictures(explanation)
    for name, picture in pictures.items():
        write_file(str(out / f"{name}.png"), picture.png)
    numbers = json.dumps(to_numbers(explanation), allow_nan=False, separators=(",", ":")) + "\n"
    write_file(str(out / "explain.json"), numbers.encode("utf-8"))
    path = out / "explain.html"
    write_file(str(path), make_page(explanation, pictures, facts).encode("utf-8", "replace"))
    return path


def _print_errors(explanation: "Explanation", is_float32: bool) -> bool:
    """Prints how exact every layer's account is; returns whether all are, as in `is_exact`."""
    from simplernn_jax.analysis.accounts import LARGEST_ERROR, is_exact

    verdicts = [is_exact(account, is_float32) for account in explanation.accounts]
    for name, mixer, account, verdict in zip(
        explanation.layer_names, explanation.mixers, explanation.accounts, verdicts, strict=True
    ):
        operator = "the recurrence" if mixer == "simple_rnn" else "softmax attention"
        print(
            f"{name}: the map reproduces {operator} to {float(account.operator_error):.1e} "
            f"(relative) and the layer's output to {float(account.layer_error):.1e}"
            + ("" if verdict else f"   not within {LARGEST_ERROR:g}: do not trust it")
        )
    return all(verdicts)


if __name__ == "__main__":
    command_line.run(main)
