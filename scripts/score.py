"""Score a text: the lines that surprise a trained model most, and what it expected instead.

    python scripts/score.py --workdir runs/base module.py
    python scripts/score.py --workdir runs/logs --mask=digits,hex --relative --top=50 system.log
    tail -F system.log | python scripts/score.py --workdir runs/logs --follow -

Each file is one document, which is read once, in constant memory; - is standard input. A line is
ranked by the squares of its tokens' bits beyond those that the model expected.
"""

import bootstrap

if __name__ == "__main__":
    bootstrap.start()

import bisect
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable

from typing import TYPE_CHECKING

from absl import flags

from simplernn_jax.cli import command_line
from simplernn_jax.errors import UserError, one_line
from simplernn_jax.files import check_writable, open_file, write_file

if TYPE_CHECKING:
    from simplernn_jax.analysis.surprise import Unit

_MODEL = command_line.ModelFlags()
_FILES = command_line.define_arguments("FILE...")
_BY = flags.DEFINE_enum("by", "line", ["line", "word", "token"], "Units that are ranked.")
_TOP = flags.DEFINE_integer("top", 20, "Number of units that are printed.", lower_bound=0)
_JSON = flags.DEFINE_bool("json", False, "Print a JSON object for each unit.")
_HTML = flags.DEFINE_string("html", None, "HTML file to write: the text, coloured by its bits.")
_MASK = flags.DEFINE_list("mask", [], "Fields that do not count: digits, hex, uuid, time.")
_RELATIVE = flags.DEFINE_bool(
    "relative", False, "Rank lines relative to earlier lines that differ in words and numbers only."
)
_FOLLOW = flags.DEFINE_bool(
    "follow", False, "Print surprising lines as they come, and wait for more at the end of a file."
)
_QUANTILE = flags.DEFINE_float(
    "quantile",
    0.99,
    "With --follow, print lines that surprise more than this share of the last 10,000.",
    lower_bound=0,
    upper_bound=1,
)
_RECENT = 10_000
_FIRST = 100
"""Lines before the first that is printed with --follow."""


def main() -> None:
    """Score the files with the chosen checkpoint of --workdir."""
    if not _FILES.value:
        raise UserError("no file: name the files to score, or - for standard input")
    from simplernn_jax.analysis.surprise import MASKS, Page, Top, Units, read_blocks

    for mask in _MASK.value:
        if mask not in MASKS:
            raise UserError(f"--mask={mask}: use {', '.join(MASKS)}")
    if _HTML.value is not None:
        if _FOLLOW.value:
            raise UserError("--html shows whole texts: leave out --follow")
        check_writable(_HTML.value)
    if _FOLLOW.value and len(_FILES.value) > 1:
        raise UserError("--follow reads one file: name one, or - for standard input")
    readers = {name: _reader(name) for name in _FILES.value}  # before the model is loaded
    model, tokenizer, _ = _MODEL.load()
    from simplernn_jax.inference.scoring import Scorer

    top, quantile = Top(_TOP.value), _Quantile()
    page = Page() if _HTML.value is not None else None
    num_bytes, num_bits, num_lines = 0, 0.0, 0
    for name, read in readers.items():
        scorer = Scorer(model, tokenizer)
        units = Units(_BY.value, tuple(_MASK.value), _RELATIVE.value)
        if page is not None:
            page.begin(name)
        for text in read_blocks(read, name):
            block = scorer.feed(text)
            num_bytes, num_lines = num_bytes + len(block.text), num_lines + text.count("\n")
            num_bits += float(block.scores.bits.sum(dtype="float64"))
            if page is not None:
                page.add(block)
            for unit in units.cut(block):
                if not _FOLLOW.value:
                    top.add(name, unit)
                elif quantile.exceeds(unit.surprise):
                    _print(name, unit, scorer.expected_text(unit.block, unit.peak_token))
        if page is not None:
            page.end()
    if not num_bytes:
        raise UserError(f"{one_line(', '.join(readers))}: empty; score a text")
    rows = [
        (name, unit, scorer.expected_text(unit.block, unit.peak_token))
        for name, unit in top.units()
    ]
    for row in rows:
        _print(*row)
    if page is not None:
        names = one_line(", ".join(readers), 100)
        shown = f"Model: {_MODEL.checkpoint} checkpoint of {one_line(_MODEL.workdir)}."
        write_file(_HTML.value, page.render(names, shown, rows).encode())
        print(f"page: {_HTML.value}", file=sys.stderr)
    if not _JSON.value:
        print(f"{num_lines:,} lines, {num_bytes:,} bytes: {num_bits / num_bytes:.4f} bits/byte")


class _Quantile:
    """Which numbers exceed --quantile of the last 10,000."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def exceeds(self, value: float) -> bool:
        """Add a number; return whether it exceeds the quantile of those before."""
        size = len(self._sorted)
        is_high = (
            size >= _FIRST and value > self._sorted[min(size - 1, int(_QUANTILE.value * size))]
        )
        self._recent.append(value)
        bisect.insort(self._sorted, value)
        if len(self._recent) > _RECENT:
            del self._sorted[bisect.bisect_left(self._sorted, self._recent.popleft())]
        return is_high


def _reader(name: str) -> Callable[[int], bytes]:
    """Open a file; return a function that reads up to so many bytes, none at its end."""
    if name == "-":
        return lambda size: os.read(sys.stdin.fileno(), size)
    path = command_line.expand_path(name, "FILE")
    try:
        file = open_file(path)
    except OSError as error:
        raise UserError(f"{one_line(name)}: {error.strerror}; name a file of text") from error

    def read(size: int) -> bytes:
        nonlocal file
        while not (data := file.read1(size)) and _FOLLOW.value:
            time.sleep(0.2)
            status = os.stat(path) if os.path.exists(path) else None
            if status is None:
                continue
            if status.st_ino != os.fstat(file.fileno()).st_ino or status.st_size < file.tell():
                file = open_file(path)  # rotated or truncated
        return data

    return read


def _print(name: str, unit: "Unit", expected: str) -> None:
    before, peak, after = unit.around_peak()
    if _JSON.value:
        record = {
            "file": name,
            "line": unit.line,
            "column": unit.column + 1,
            "text": before + peak + after,
            "bits": round(unit.bits, 3),
            "surprise": round(unit.surprise, 3),
            "at": len(before),
            "expected": expected,
        }
        print(json.dumps(record, ensure_ascii=False), flush=True)
        return
    before = before[-60:].replace("\t", " ")
    place = f"{name}:{unit.line}" + (f":{unit.column + 1}" if _BY.value != "line" else "")
    print(f"{place}  {unit.bits:.1f} bits, {unit.bits / max(len(unit.text), 1):.2f} per byte")
    print(f"    {before}{peak}{after[:40]}")
    print(f"    {' ' * len(before)}^ expected {expected!r}", flush=True)


if __name__ == "__main__":
    command_line.run(main)
