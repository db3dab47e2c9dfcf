"""Visualize how a trained model processes a text, on an HTML page.

    python scripts/explain.py --workdir runs/base --text "def main():" --out explained
    python scripts/explain.py --workdir runs/base --text_file story.txt --out explained

Writes explain.html, a standalone page, its plots as PNG files, and their numbers as explain.json,
where attention weights are rounded to 1e-4 of the head's maximum. The page has a summary, the
model's memory, the value of its state, the contributions to one prediction, and the attention map
of every layer. The text is one document; token indices start at 1.

Exits with code 1 if the attention map of a layer does not reproduce its output, checked for the
mixer and, in float32 models, for the whole layer.
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

from simplernn_jax.cli import command_line
from simplernn_jax.errors import UserError, counted, one_line
from simplernn_jax.files import check_output, write_file

if TYPE_CHECKING:  # slow imports happen after the flags are checked
    from simplernn_jax.analysis import Explanation

_MODEL = command_line.ModelFlags(quantizes=False)
_CORPUS = command_line.CorpusFlags()
_TEXT = flags.DEFINE_string("text", None, "Text to analyze.")
_TEXT_FILE = flags.DEFINE_string("text_file", None, "UTF-8 file to analyze; - is standard input.")
_OUT = flags.DEFINE_string("out", None, "Folder for the page; created if missing.")
_TOKEN = flags.DEFINE_integer(
    "token",
    None,
    "1-based index of the token to explain; default: the one whose loss drops most with distant "
    "context.",
)
_MAP_TOKENS = flags.DEFINE_integer(
    "map_tokens", 192, "Tokens shown in the maps, around --token.", lower_bound=8, upper_bound=1024
)

_OUTPUT = re.compile(r"explain\.(html|json)|[a-z_]+(\d+)?\.png")
"""Names of the files that this script writes."""


def main() -> int:
    """Explain the text with the chosen valid checkpoint of --workdir."""
    workdir = _MODEL.workdir
    if not _OUT.value:
        raise UserError("no --out: specify a folder for the page")
    if _TEXT.value is None and _TEXT_FILE.value is None:
        raise UserError("no --text: pass a text, or a file with --text_file")
    out = Path(command_line.expand_path(_OUT.value, "out"))
    _check_out(out)
    text = command_line.read_text(_TEXT.value, _TEXT_FILE.value, name="text")
    from simplernn_jax.analysis import explain
    from simplernn_jax.checkpoint.checkpointer import read_config
    from simplernn_jax.inference.loading import is_exported

    model, tokenizer, config = _MODEL.load()
    try:
        validation = _CORPUS.open(workdir).validation
    except UserError as error:
        logging.warning("held-out text unavailable, evaluating on the given text: %s", error)
        validation = None
    out.mkdir(parents=True, exist_ok=True)
    explanation = explain(
        model,
        tokenizer,
        config,
        text,
        token=_TOKEN.value,
        map_tokens=_MAP_TOKENS.value,
        validation=validation,
    )
    logging.info("plotting ...")
    sizes, given = config.model, flags.FLAGS["workdir"].value
    facts = {
        "model": f"{counted(sizes.num_layers, 'layer')} of width {sizes.hidden_dim}, "
        f"{counted(sizes.num_heads, 'head')}",
        "checkpoint": given
        if is_exported(workdir)
        else f"step {read_config(workdir, _MODEL.checkpoint)[2]:,} of {given}",
    }
    is_named = _TEXT_FILE.value not in (None, "-")
    name = Path(_TEXT_FILE.value).name if is_named else f"“{one_line(text, 60)}”"
    page = _write(out, explanation, name, facts)
    is_exact = _print_errors(explanation, sizes.precision == sizes.state_precision == "float32")
    print(f"evaluated on {explanation.state_value.evaluated}")
    print(f"page: {page}")
    return 0 if is_exact else 1


def _check_out(out: Path) -> None:
    """Reject an unusable output folder before the computation."""
    if os.path.lexists(out):
        if not out.is_dir():
            raise UserError(f"--out={_OUT.value}: not a folder; specify one")
        for name in filter(_OUTPUT.fullmatch, os.listdir(out)):
            try:
                check_output(out / name)
            except OSError as error:
                raise UserError(
                    f"--out={_OUT.value}: {name} in it cannot be replaced ({error.strerror}); "
                    "remove it or use another folder"
                ) from error
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--out={_OUT.value}: {nearest} is not writable; use another folder")


def _write(out: Path, explanation: "Explanation", name: str, facts: dict[str, str]) -> Path:
    """Write the plots, the numbers and, last, the page; return its path."""
    from simplernn_jax.analysis.page import draw_plots, make_page, to_numbers

    pictures = draw_plots(explanation)
    for picture in pictures.values():
        write_file(str(out / f"{picture.name}.png"), picture.png)
    numbers = json.dumps(to_numbers(explanation), allow_nan=False, separators=(",", ":")) + "\n"
    write_file(str(out / "explain.json"), numbers.encode("utf-8"))
    path = out / "explain.html"
    write_file(str(path), make_page(explanation, pictures, name, facts).encode("utf-8", "replace"))
    return path


def _print_errors(explanation: "Explanation", is_float32: bool) -> bool:
    """Print the errors of every layer's map; return whether all are exact, as in `is_exact`."""
    from simplernn_jax.analysis.decomposition import MAX_ERROR, is_exact

    verdicts = [is_exact(layer, is_float32) for layer in explanation.layers]
    for name, mixer, layer, verdict in zip(
        explanation.layer_names, explanation.mixers, explanation.layers, verdicts, strict=True
    ):
        operator = "softmax attention" if mixer == "attention" else "the recurrence"
        print(
            f"{name}: the map reproduces {operator} to {float(layer.operator_error):.1e} "
            f"(relative) and the layer's output to {float(layer.layer_error):.1e}"
            + ("" if verdict else f"   exceeds the tolerance {MAX_ERROR:g}")
        )
    return all(verdicts)


if __name__ == "__main__":
    command_line.run(main)
