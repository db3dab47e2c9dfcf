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

import codecs
import heapq
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from simplernn_jax.cli import command_line, process_start
from simplernn_jax.errors import UserError, one_line
from simplernn_jax.files import check_writable, open_file, write_file

if TYPE_CHECKING:
    from simplernn_jax.analysis.surprise import ScoredBlock, Unit

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
_BLOCK_BYTES = 1 << 14
"""Bytes that are read at a time; a line of more is several units."""
_PAGE_BYTES = 1 << 20
"""Bytes of all texts that a page shows."""


def main() -> None:
    """Score the files with the chosen checkpoint of --workdir."""
    names = list(dict.fromkeys(_FILES.value))
    if not names:
        raise UserError("no file: name the files to score, or - for standard input")
    if _FOLLOW.value and (_HTML.value is not None or len(names) > 1):
        raise UserError("--follow reads one file, without --html: leave out the others")
    if _FOLLOW.value and flags.FLAGS["top"].present:
        raise UserError("--follow prints every surprising line: leave out --top")
    if flags.FLAGS["quantile"].present and not _FOLLOW.value:
        raise UserError("--quantile needs --follow")
    if _FOLLOW.value:
        process_start.raise_on_signals()  # so that tail ends, too
    if _HTML.value is not None:
        check_writable(_HTML.value)
    paths = {name: command_line.expand_path(name, "FILE") for name in names if name != "-"}
    for name, path in paths.items():  # errors come before the model is loaded
        with open_file(path) as file:
            if b"\0" in file.read(_BLOCK_BYTES):
                raise UserError(f"{name}: a binary file; score text in UTF-8")
    model, tokenizer, _ = _MODEL.load()
    from simplernn_jax.analysis import surprise

    num_bytes, num_bits = 0, 0.0
    texts: dict[str, list[tuple[int, str]]] = {name: [] for name in names}

    def score(name: str) -> "Iterator[ScoredBlock]":
        nonlocal num_bytes, num_bits
        try:
            for block in surprise.score(model, tokenizer, _read(paths.get(name))):
                if _HTML.value is not None and num_bytes < _PAGE_BYTES:
                    texts[name] += surprise.colored(block)
                num_bytes += len(block.text)
                num_bits += float(block.bits.sum(dtype="float64"))
                yield block
        except UserError as error:
            raise UserError(f"{name}: {error}") from error

    options = _BY.value, _MASK.value, _RELATIVE.value
    found: Iterator[tuple[str, Unit]] = (
        (name, unit) for name in names for unit in surprise.cut_units(score(name), *options)
    )
    if _FOLLOW.value:
        found = surprise.above_quantile(found, _QUANTILE.value)
    elif _TOP.value:
        found = iter(heapq.nlargest(_TOP.value, found, key=lambda pair: pair[1].surprise))
    is_ranked, rows = _FOLLOW.value or _TOP.value > 0, []
    for name, unit in found:
        expected = surprise.expected_text(model, tokenizer, unit.place) if is_ranked else None
        _print(name, unit, expected)
        if is_ranked and _HTML.value is not None:
            rows.append((name, unit, expected))
    if not num_bytes:
        raise UserError(f"{', '.join(names)}: empty; score a text")
    if _HTML.value is not None:
        shown = f"Model: {_MODEL.checkpoint} checkpoint of {flags.FLAGS['workdir'].value}."
        if num_bytes > _PAGE_BYTES:
            shown += f" The end of {num_bytes:,} bytes is not shown."
        page = surprise.render_page(one_line(", ".join(names), 100), shown, texts, rows)
        write_file(_HTML.value, page.encode("utf-8", "replace"))
        logging.info("page: %s", _HTML.value)
    if not _JSON.value:
        print(f"{num_bytes:,} bytes, {num_bits / num_bytes:.4f} bits/byte")


def _read(path: str | None) -> Iterator[str]:
    """Yield the text of a file, or of standard input; with --follow, as it grows."""
    if path is None or not _FOLLOW.value:
        with sys.stdin.buffer if path is None else open_file(path) as file:
            yield from _decode(file)
        return
    command = ["tail", "-n", "+1", "-F", "--", path]  # also when the file is truncated or rotated
    with subprocess.Popen(command, stdout=subprocess.PIPE) as tail:
        try:
            yield from _decode(tail.stdout)
        finally:
            tail.terminate()


def _decode(file: Any) -> Iterator[str]:
    """Yield whole lines, or parts of long ones; bytes that are not UTF-8 become U+FFFD."""
    decoder, rest = codecs.getincrementaldecoder("utf-8")("replace"), ""
    while data := (file.read1 if _FOLLOW.value else file.read)(_BLOCK_BYTES):
        rest += decoder.decode(data)
        end = rest.rfind("\n") + 1 or (len(rest) if len(rest) >= _BLOCK_BYTES else 0)
        yield rest[:end]
        rest = rest[end:]
    yield rest + decoder.decode(b"", final=True)


def _print(name: str, unit: "Unit", expected: str | None) -> None:
    if _JSON.value:
        record: dict[str, Any] = {"file": name, **unit._asdict(), "expected": expected}
        del record["place"]
        print(json.dumps(record), flush=_FOLLOW.value)
        return
    column = f":{unit.column}" if _BY.value != "line" else ""
    place = f"{_printable(name)}:{unit.line}{column}"
    before = _printable(unit.text[: unit.at][-60:])
    print(f"{place}  surprise {unit.surprise:.1f}, {unit.bits:.1f} bits")
    print(f"    {before}{_printable(unit.text[unit.at :][:61])}")
    if expected is not None:
        print(f"    {' ' * len(before)}^ expected {expected!r}", flush=_FOLLOW.value)


def _printable(text: str) -> str:
    """Replace tabs and control codes, which may come from a log, by one space each."""
    return "".join(c if c.isprintable() else " " for c in text)


if __name__ == "__main__":
    command_line.run(main)
