"""Score a text: the lines that surprise a trained model most, and what it expected instead.

    python scripts/score.py --workdir runs/base module.py
    python scripts/score.py --workdir runs/base --by word --html module.html module.py
    python scripts/score.py --workdir runs/logs --mask digits --relative system.log
    tail -F system.log | python scripts/score.py --workdir runs/logs --follow -

Each file is one document, which is read once, in constant memory; - is standard input. A line is
ranked by the bits of its most surprising token beyond those that the model expected there.
"""

import bootstrap

if __name__ == "__main__":
    bootstrap.start()

import functools
import heapq
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from simplernn_jax.cli import command_line
from simplernn_jax.errors import UserError, one_line
from simplernn_jax.files import check_writable, open_file, write_file

if TYPE_CHECKING:
    from simplernn_jax.analysis.surprise import Unit

_MODEL = command_line.ModelFlags(quantizes=False)
_FILES = command_line.Arguments("FILE...")
_BY = flags.DEFINE_enum("by", "line", ["line", "word", "token"], "Units that are ranked.")
_TOP = flags.DEFINE_integer(
    "top",
    20,
    "Number of units that are printed, the most surprising first; 0 prints all, in the order of "
    "the text and without what was expected.",
    lower_bound=0,
    upper_bound=1000,
)
_JSON = flags.DEFINE_bool("json", False, "Print a JSON object for each unit.")
_HTML = flags.DEFINE_string("html", None, "HTML file to write: the text, colored by its bits.")
_MASK = flags.DEFINE_multi_enum(
    "mask",
    [],
    ["digits", "hex", "uuid", "time"],
    "Fields whose bits do not count; may be given several times.",
)
_RELATIVE = flags.DEFINE_bool(
    "relative", False, "Rank relative to earlier lines that differ in words and numbers only."
)
_FOLLOW = flags.DEFINE_bool(
    "follow", False, "Print surprising lines as they come, and wait for more at the end of a file."
)
_QUANTILE = flags.DEFINE_float(
    "quantile",
    0.99,
    "With --follow, print lines that surprise more than this share of the last 10,000.",
    lower_bound=0,
    upper_bound=0.9999,
)
_PAGE_BYTES = 1 << 20
"""Bytes of all texts that a page shows."""


def main() -> None:
    """Score the files with the chosen checkpoint of --workdir."""
    names = list(dict.fromkeys(_FILES.value))
    if not names:
        raise UserError("no file: name the files to score, or - for standard input")
    if _FOLLOW.value and (_HTML.value is not None or len(names) > 1):
        raise UserError("--follow reads one file, without --html: leave out the others")
    if _HTML.value is not None:
        check_writable(_HTML.value)
    for name in names:  # errors come before the model is loaded
        if name != "-" and not _FOLLOW.value:
            next(_blocks(name), "")
    model, tokenizer, _ = _MODEL.load()
    from simplernn_jax.analysis.surprise import Threshold, Units, colored, render_page
    from simplernn_jax.inference.scoring import Scorer, expected_text

    num_bytes, num_bits, problem = 0, 0.0, ""
    texts: dict[str, list[tuple[int, str]]] = {}

    def score() -> "Iterator[tuple[str, Unit]]":
        nonlocal num_bytes, num_bits, problem
        for name in names:
            scorer, units = Scorer(model, tokenizer), Units(_BY.value, _MASK.value, _RELATIVE.value)
            parts = texts.setdefault(name, [])
            for text in _blocks(name):
                try:
                    block = scorer.feed(text)
                except UserError as error:  # what was scored is not lost
                    problem = f"{name}, after {num_bytes:,} bytes: {error}"
                    return
                if _HTML.value is not None and num_bytes < _PAGE_BYTES:
                    parts += colored(block)
                num_bytes += len(block.text)
                num_bits += float(block.bits.sum(dtype="float64"))
                for unit in units.cut(block):
                    yield name, unit

    rows = []
    if _FOLLOW.value:
        threshold = Threshold(_QUANTILE.value)
        for name, unit in score():
            if threshold.is_exceeded(unit.surprise):
                _print(name, unit, expected_text(model, tokenizer, unit.place))
    elif not _TOP.value:
        for name, unit in score():
            _print(name, unit)
    else:
        for name, unit in heapq.nlargest(_TOP.value, score(), key=lambda found: found[1].surprise):
            rows.append((name, unit, expected_text(model, tokenizer, unit.place)))
            _print(*rows[-1])
    if not num_bytes:
        raise UserError(problem or f"{', '.join(names)}: empty; score a text")
    if _HTML.value is not None:
        shown = f"Model: {_MODEL.checkpoint} checkpoint of {flags.FLAGS['workdir'].value}."
        if num_bytes > _PAGE_BYTES:
            shown += f" The end of {num_bytes:,} bytes is not shown."
        page = render_page(one_line(", ".join(names), 100), shown, texts, rows)
        write_file(_HTML.value, page.encode("utf-8", "replace"))
        logging.info("page: %s", _HTML.value)
    if not _JSON.value:
        print(f"{num_bytes:,} bytes, {num_bits / num_bytes:.4f} bits/byte")
    if problem:
        raise UserError(problem)


def _blocks(name: str) -> Iterator[str]:
    """Yield the text of a file, or of standard input for ``-``; with --follow, as it grows."""
    from simplernn_jax.analysis.surprise import read_blocks

    if name == "-":
        with open(sys.stdin.fileno(), "rb", closefd=False) as stdin:
            yield from read_blocks(stdin.read1 if _FOLLOW.value else stdin.read, "standard input")
        return
    path = command_line.expand_path(name, "FILE")
    with open_file(path) as file:
        if not _FOLLOW.value:
            yield from read_blocks(file.read, name)
            return
    command = ["tail", "-n", "+1", "-F", "--", path]  # also when the file is truncated or rotated
    with subprocess.Popen(command, stdout=subprocess.PIPE) as tail:
        assert tail.stdout is not None
        try:
            yield from read_blocks(functools.partial(os.read, tail.stdout.fileno()), name)
        finally:
            tail.terminate()


def _print(name: str, unit: "Unit", expected: str | None = None) -> None:
    before, peak, after = unit.around_peak()
    if _JSON.value:
        place: dict[str, Any] = {"file": name, "line": unit.line, "column": unit.column + 1}
        numbers = {"bits": unit.bits, "surprise": unit.surprise}
        found = {} if expected is None else {"at": len(before), "expected": expected}
        record = place | {"text": before + peak + after} | numbers | found
        print(json.dumps(record), flush=_FOLLOW.value)
        return
    column = f":{unit.column + 1}" if _BY.value != "line" else ""
    line = f"{_printable(name)}:{unit.line}{column}"
    line += f"  surprise {unit.surprise:.1f}, {unit.bits:.1f} bits"
    if expected is None:
        print(f"{line}  {_printable(before + peak + after)}")
        return
    before = _printable(before[-60:])
    print(f"{line}\n    {before}{_printable(peak + after[:60])}")
    print(f"    {' ' * len(before)}^ expected {expected!r}", flush=_FOLLOW.value)


def _printable(text: str) -> str:
    """Replace tabs and control codes, which may come from a log, by one space each."""
    return "".join(c if c.isprintable() else " " for c in text)


if __name__ == "__main__":
    command_line.run(main)
