"""Suggest text at a place in a file: what a model puts between the text before and after it.

    python scripts/complete.py --workdir runs/complete src/app.py:12:8
    git show HEAD:src/app.py | python scripts/complete.py --workdir runs/complete --num=3 -- -:12:8

Lines and columns begin with 1, as in editors. The model must fill in the middle;
configs/complete.py trains one.
"""

import bootstrap

if __name__ == "__main__":
    bootstrap.start()

import re

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
    prefix, suffix = split_text(" ".join(_PLACE.value))
    model, tokenizer, _ = _MODEL.load()
    from simplernn_jax.inference.text import suggest

    settings = {"max_new_tokens": _SAMPLING.max_new_tokens, **_SAMPLING.settings}
    texts = suggest(model, tokenizer, prefix, suffix, _NUM.value, **settings)
    for number, text in enumerate(texts, 1):
        print(text if _NUM.value == 1 else f"--- {number} of {len(texts)} ---\n{text}")


def split_text(place: str) -> tuple[str, str]:
    """Return the text before and after a place."""
    found = re.fullmatch("(.+):([0-9]{1,9}):([0-9]{1,9})", place, re.DOTALL)
    if found is None:
        raise UserError(f"{place!r}: give one place as FILE:LINE:COLUMN")
    line, column = int(found[2]) - 1, int(found[3]) - 1
    lines = command_line.read_text(None, found[1], name="file").split("\n")
    if not 0 <= line < len(lines) or not 0 <= column <= len(lines[line]):
        what = f"no such place in {counted(len(lines), 'line')}"
        if 0 <= line < len(lines):
            what = f"line {line + 1} has {counted(len(lines[line]), 'character')}"
        raise UserError(f"{place}: {what}; lines and columns begin with 1")
    before = "\n".join([*lines[:line], lines[line][:column]])
    return before, "\n".join([lines[line][column:], *lines[line + 1 :]])


if __name__ == "__main__":
    command_line.run(main)
