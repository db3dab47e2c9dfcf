"""Long-range dependency: how many pairs of key and value a state of some size can give back.

Everyone learns the same lessons: first short rows of few pairs, then rows of all numbers of pairs.
Tests are on new rows of the length of the last lesson, and on rows four times as long.
"""

from typing import Any, NamedTuple

from benchmarks.attention.learning import Lesson
from benchmarks.attention.students import ATTENTION, LONGER, PLAIN, Student, examine, recurrent
from simplernn_jax.data.tasks import AssociativeRecall


class Sizes(NamedTuple):
    """How much is measured."""

    pairs: tuple[int, ...]
    length: int
    """Of the last lesson's rows."""
    states: tuple[int, ...]
    """Key and value channels of the recurrence's one head."""
    steps: tuple[int, int]
    """Of the easy and the hard lesson."""
    rates: dict[str, tuple[float, ...]]
    rows: int
    """Of each test."""


QUICK = Sizes((4, 8, 16), 48, (64,), (400, 100), {"muon": (3e-2,), "adamw": ()}, 128)
FULL = Sizes(
    (4, 8, 16, 32, 64),
    192,
    (16, 32, 64, 128),
    (1500, 1500),
    {"muon": (1.5e-2, 3e-2), "adamw": (3e-3, 1e-2)},
    256,
)
SYMBOLS = 64
"""Keys there are, and values as many."""
EASY = AssociativeRecall(pairs=(4, 8, 16), row_length=48, symbols=SYMBOLS)
EASY_ROWS, HARD_TOKENS = 32, 3072


def measure(sizes: Sizes) -> list[dict[str, Any]]:
    """What `examine` returns for every student; curves ``same`` and ``longer``, by pairs."""
    students = [*map(recurrent, sizes.states), ATTENTION, PLAIN]
    return [measure_one(student, sizes) for student in students]


def measure_one(student: Student, sizes: Sizes) -> dict[str, Any]:
    """One of those."""

    def task(length: int, *pairs: int) -> AssociativeRecall:
        return AssociativeRecall(pairs=pairs, row_length=length, symbols=SYMBOLS)

    lessons = [
        Lesson(EASY, sizes.steps[0], EASY_ROWS),
        Lesson(task(sizes.length, *sizes.pairs), sizes.steps[1], HARD_TOKENS // sizes.length),
    ]
    exams = {
        curve: {pairs: task(length, pairs) for pairs in sizes.pairs}
        for curve, length in (("same", sizes.length), ("longer", LONGER * sizes.length))
    }
    return examine(student, lessons, sizes.rates, exams, sizes.rows)
