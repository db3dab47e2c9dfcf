"""Suggest text at a place in a file: what a model puts between the text before and after it.

    python scripts/complete.py --workdir runs/complete src/app.py:12:8
    git show HEAD:src/app.py | python scripts/complete.py --workdir runs/complete -:12:8 --num=3

Lines and columns begin with 1, as in editors. The model must fill in the middle;
configs/complete.py trains one.
"""

import bootstrap

if __name__ == "__main__":
    bootstrap.start()

import re
import sys

from absl import flags

from simplernn_jax.cli import command_line
from simplernn_jax.errors import UserError, counted

_PLACE = command_line.Arguments("FILE:LINE:COLUMN")
_MODEL = command_line.ModelFlags()
_SAMPLING = command_line.SamplingFlags(max_new_tokens=128, temperature=0.8)
_NUM = flags.DEFINE_integer(
    "num", 1, "Suggestions: the result of greedy decoding, then samples; equal ones once.", 1, 1024
)


def main() -> None:
    """Print suggestions for a place in a file; - is standard input."""
    prefix, suffix = split_text(_PLACE.value)
    model, tokenizer, _ = _MODEL.load()
    from simplernn_jax.inference.text import suggest

    settings = {"max_new_tokens": _SAMPLING.max_new_tokens, **_SAMPLING.settings}
    texts = suggest(model, tokenizer, prefix, suffix, _NUM.value, **settings)
    for number, text in enumerate(texts, 1):
        print(text if _NUM.value == 1 else f"--- {number} of {len(texts)} ---\n{text}")


def split_text(places: list[str]) -> tuple[str, str]:
    """Return the text before and after a place."""
    found = re.fullmatch("(.+):([0-9]{1,9}):([0-9]{1,9})", " ".join(places), re.DOTALL)
    if found is None or len(places) > 1:
        raise UserError(f"{' '.join(places)!r}: give one place as FILE:LINE:COLUMN")
    path, line, column = found[1], int(found[2]), int(found[3])
    text = command_line.read_text(None, path, name="file")
    if "\0" in text:
        raise UserError(f"{path}: a binary file; give one of text")
    lines = text.split("\n")
    if not 1 <= line <= len(lines):
        raise UserError(f"{places[0]}: no such line; {path} has {counted(len(lines), 'line')}")
    length = len(lines[line - 1].removesuffix("\r"))
    if not 1 <= column <= length + 1:
        raise UserError(f"{places[0]}: no such column; line {line} ends at column {length + 1}")
    at = sum(map(len, lines[: line - 1])) + line - 1 + column - 1
    return text[:at], text[at:]


if __name__ == "__main__":
    places = [word for word in sys.argv if word.startswith("-:")]
    if places and "--" not in sys.argv:  # or they would be flags
        sys.argv = [*(word for word in sys.argv if word not in places), "--", *places]
    command_line.run(main)
