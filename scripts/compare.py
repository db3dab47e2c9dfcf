"""Compare training runs: configurations, final metrics and loss curves.

    python scripts/compare.py runs/base runs/mine --out compared

Prints the fields in which the configurations differ and a table of metrics, and draws the curves
into compare.png in --out. Reads config.json and metrics.jsonl of each workdir. Tokens/s are
comparable on the same machine, losses with the same tokenizer and text, bits/byte on the same text.
"""

import bootstrap

if __name__ == "__main__":
    bootstrap.start()

from pathlib import Path

from absl import flags

from simplernn_jax.cli import command_line
from simplernn_jax.errors import UserError
from simplernn_jax.files import check_output, write_file

_WORKDIRS = command_line.Arguments("WORKDIR WORKDIR ...")
_OUT = flags.DEFINE_string("out", ".", "Folder for compare.png; created if missing.")


def main() -> None:
    """Compare the runs that the arguments name."""
    if len(_WORKDIRS.value) < 2:
        raise UserError("name two or more runs: python scripts/compare.py runs/base runs/mine")
    workdirs = [command_line.expand_path(path, "WORKDIR") for path in _WORKDIRS.value]
    picture = Path(command_line.expand_path(_OUT.value, "out")) / "compare.png"
    check_output(picture)
    from simplernn_jax.analysis.comparison import differences, draw, final_metrics, read_runs

    runs = read_runs(workdirs)
    names = [run.name for run in runs]
    fields = differences(runs)
    if fields:
        print(_table("configuration", names, fields))
    else:
        print("configuration: no differences")
    print("\n" + _table("metrics", names, final_metrics(runs)))
    picture.parent.mkdir(parents=True, exist_ok=True)
    write_file(picture, draw(runs))
    print(f"\ncurves: {picture}")


def _table(title: str, names: list[str], rows: dict[str, list[str]]) -> str:
    lines = [[title, *names], *([name, *cells] for name, cells in rows.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


if __name__ == "__main__":
    command_line.run(main)
