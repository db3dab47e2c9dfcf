"""Metrics of a run on disk: one JSON object a line, and TensorBoard events."""

import json
import math
import os
from pathlib import Path
from typing import Any

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends to ``metrics.jsonl`` and to TensorBoard files under ``tensorboard``.

    A resumed run first drops what an interrupted one wrote after its last checkpoint, so that
    every step stands there once. What a finished run measures again is not written twice.
    """

    def __init__(self, workdir: str, first_step: int):
        """Opens the files of `workdir`; rows of steps after `first_step` are dropped."""
        from tensorboardX import SummaryWriter

        path = Path(workdir) / FILE_NAME
        kept = [row for row in read_metrics(workdir) if row["step"] <= first_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
        os.replace(temporary, path)
        self._known = {(row["step"], row["kind"]) for row in kept}
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, kind: str, **values: Any) -> None:
        """Writes one row: numbers go to TensorBoard as scalars, text as text.

        In the file, a number that is not finite is null: JSON has none such.
        A row of this step and kind that an earlier run wrote stays instead.
        """
        if (step, kind) in self._known:
            return
        row = {"step": step, "kind": kind, **values}
        self._file.write(_line(row))
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, str):
                self._events.add_text(f"{kind}/{name}", value, step)
            else:
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flushes both."""
        try:
            self._file.close()
        finally:
            self._events.close()


def _line(row: dict[str, Any]) -> str:
    values = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(values, allow_nan=False) + "\n"


def read_metrics(workdir: str) -> list[dict[str, Any]]:
    """All whole rows of ``metrics.jsonl``; a line cut off by a crash is left out."""
    path = Path(workdir) / FILE_NAME
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
