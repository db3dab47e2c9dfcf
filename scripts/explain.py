"""Visualize how a trained model processes a text, on an HTML page.

    python scripts/explain.py --workdir runs/base --text "def main():" --out explained
    python scripts/explain.py --workdir runs/base --text_file story.txt --out explained

Writes explain.html, a standalone page, its plots as PNG files, and their numbers as explain.json.
The page has a summary, the model's memory, the value of its state, the contributions to one
prediction, and the attention map of every layer. The text is one document; token indices start
at 1.

Exits with code 1 if the attention map of a layer does not reproduce its output, checked for the
mixer and, in float32 models, for the whole layer.
"""

import bootstrap

if __name__ == "__main__":
    bootstrap.start()

import json
from pathlib import Path

from absl import flags, logging

from simplernn_jax.cli import command_line
from simplernn_jax.errors import UserError, counted, one_line
from simplernn_jax.files import check_writable, write_file

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


def main() -> int:
    """Explain the text with the chosen valid checkpoint of --workdir."""
    workdir = _MODEL.workdir
    if not _OUT.value:
        raise UserError("no --out: specify a folder for the page")
    if _TEXT.value is None and _TEXT_FILE.value is None:
        raise UserError("no --text: pass a text, or a file with --text_file")
    text = command_line.read_text(_TEXT.value, _TEXT_FILE.value, name="text")
    out = Path(command_line.expand_path(_OUT.value, "out"))
    out.mkdir(parents=True, exist_ok=True)
    check_writable(out / "explain.html")  # before the computation
    from simplernn_jax.analysis import explain
    from simplernn_jax.analysis.decomposition import MAX_ERROR, is_exact
    from simplernn_jax.analysis.page import draw_plots, make_page, to_numbers

    model, tokenizer, config = _MODEL.load()
    try:
        validation = _CORPUS.open(workdir).validation
    except UserError as error:
        logging.warning("held-out text unavailable, evaluating on the given text: %s", error)
        validation = None
    options = {"token": _TOKEN.value, "map_tokens": _MAP_TOKENS.value, "validation": validation}
    explanation = explain(model, tokenizer, config, text, **options)
    logging.info("plotting ...")
    pictures = draw_plots(explanation)
    for name, picture in pictures.items():
        write_file(out / f"{name}.png", picture)
    numbers = json.dumps(to_numbers(explanation), allow_nan=False, separators=(",", ":")) + "\n"
    write_file(out / "explain.json", numbers.encode("utf-8"))
    sizes = config.model
    facts = {
        "model": f"{counted(sizes.num_layers, 'layer')} of width {sizes.hidden_dim}, "
        f"{counted(sizes.num_heads, 'head')}",
        "checkpoint": f"{_MODEL.checkpoint} of {flags.FLAGS['workdir'].value}",
    }
    is_named = _TEXT_FILE.value not in (None, "-")
    name = Path(_TEXT_FILE.value).name if is_named else f"“{one_line(text, 60)}”"
    page = make_page(explanation, pictures, name, facts)
    write_file(out / "explain.html", page.encode("utf-8", "replace"))

    is_float32 = sizes.precision == "float32"
    code = 0
    for name, layer in zip(explanation.layer_names, explanation.layers, strict=True):
        verdict = ""
        if not is_exact(layer, is_float32):
            code, verdict = 1, f"   exceeds the tolerance {MAX_ERROR:g}"
        operator = "softmax attention" if name.endswith("(attention)") else "the recurrence"
        print(
            f"{name}: the map reproduces {operator} to {float(layer.operator_error):.1e} "
            f"(relative) and the layer's output to {float(layer.layer_error):.1e}{verdict}"
        )
    print(f"evaluated on {explanation.evaluated}")
    print(f"page: {out / 'explain.html'}")
    return code


if __name__ == "__main__":
    command_line.run(main)
