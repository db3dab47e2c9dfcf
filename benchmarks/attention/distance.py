"""Long-range dependency: copying, selective copying, and a needle at a controlled distance.

Trained at one length, tested at lengths up to four times that.
"""

from typing import Any, NamedTuple

from benchmarks.attention.learning import Lesson
from benchmarks.attention.students import ATTENTION, examine, recurrent
from simplernn_jax.data.tasks import Copying, Needle, Task


class Sizes(NamedTuple):
    """How much is measured."""

    states: tuple[int, ...]
    """Key and value channels of the recurrence's one head."""
    steps: int
    rates: dict[str, tuple[float, ...]]
    rows: int
    """Of each test."""


QUICK = Sizes((64,), 300, {"muon": (3e-2,)}, 64)
FULL = Sizes((16, 64), 1000, {"muon": (1e-2, 3e-2)}, 256)

COUNT = 8
"""Symbols to copy."""
LENGTH = 64
"""Tokens of a row in training."""
LENGTHS = (32, 64, 128, 256)
"""Tokens of a row in tests of copying."""
LEARNED_DISTANCES = (4, 8, 16, 32, 56)
DISTANCES = (4, 8, 16, 32, 56, 112, 224)
TRAIN_ROWS = 32
BEFORE = 8
"""Tokens of a needle's row that are not of its distance."""


def measure(sizes: Sizes) -> dict[str, list[dict[str, Any]]]:
    """By task, what `examine` returns for every student: accuracy by length, or by distance."""
    students = [*map(recurrent, sizes.states), ATTENTION]
    results = {}
    for name, (lesson, exam) in tasks().items():
        lessons = [Lesson(lesson, sizes.steps, TRAIN_ROWS)]
        results[name] = [
            examine(student, lessons, sizes.rates, {"accuracy": exam}, sizes.rows)
            for student in students
        ]
    return results


def tasks() -> dict[str, tuple[Task, dict[int, Task]]]:
    """By name: what is learned, and what is tested by length or distance."""

    def copying(length: int, scattered: bool) -> Task:
        return Copying(count=COUNT, blanks=length - 2 * COUNT, scattered=scattered)

    def needle(*distances: int) -> Task:
        return Needle(distances=distances, row_length=max(distances) + BEFORE)

    return {
        "copying": (copying(LENGTH, False), {n: copying(n, False) for n in LENGTHS}),
        "selective copying": (copying(LENGTH, True), {n: copying(n, True) for n in LENGTHS}),
        "needle": (needle(*LEARNED_DISTANCES), {n: needle(n) for n in DISTANCES}),
    }
