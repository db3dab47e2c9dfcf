"""The measurements as Markdown: six aspects, who is better in each, then everything measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import tables
from benchmarks.attention.cost import crossing
from benchmarks.attention.sides import ATTENTION, LAYERS, RECURRENCE, SIDES
from benchmarks.attention.students import LONGER

Results = Mapping[str, Any]
"""By name of a measurement, what it gave."""


class Line(NamedTuple):
    """One number of both sides."""

    measured: str
    values: Mapping[str, float | None]
    say: Callable[[float], str]
    more_is_better: bool = False
    as_ratio: bool = True
    """Values compare by their ratio, else by their difference."""
    equal: float = 0.05
    """Values that differ by no more than this, or by this share of the larger, count as equal."""
    says_who: bool = True
    """Whether the values are enough to say who is better."""

    def verdict(self) -> str:
        """Who is better, and by how much; nothing where only one side has a value."""
        ours, theirs = (self.values[side] for side in SIDES)
        if ours is None or theirs is None or not self.says_who:
            return ""
        low, high = sorted((ours, theirs))
        if high - low <= self.equal * (high if self.as_ratio else 1):
            return "equal"
        better = RECURRENCE if (ours > theirs) == self.more_is_better else ATTENTION
        return f"{better}, {tables.times(high / low)}" if self.as_ratio and low > 0 else better


def six_aspects(results: Results) -> str:
    """The table of the PyTorch project, its words replaced by measurements."""
    rows = []
    for aspect, lines_of in _ASPECTS.items():
        for line in lines_of(results):
            said = [
                "-" if (value := line.values[side]) is None else line.say(value) for side in SIDES
            ]
            rows.append([aspect, line.measured, *said, line.verdict()])
            aspect = ""
    return markdown(["aspect", "measured", *SIDES, "better"], rows)


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, columns as wide as they must be."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = [headings, ["-" * width for width in widths], *rows]
    return "".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |\n"
        for line in lines
    )


def _parallelism(results: Results) -> Iterator[Line]:
    rows = results.get("parallelism", [])
    for row in rows[:: max(len(rows) - 1, 1)]:
        for program, how in (("ours", "as trained here"), ("chunks", "recurrence in chunks")):
            times = {
                RECURRENCE: row["us_per_token"][program],
                ATTENTION: row["us_per_token"][ATTENTION],
            }
            what = f"us a token in training{_of(row)}, T {row['length']:,}, {how}"
            yield Line(what, times, lambda us: tables.number(us, 1))
    for row in rows[-1:]:
        chain = {RECURRENCE: row["chain"]["chunks"], ATTENTION: row["chain"][ATTENTION]}
        what = (
            f"longest chain of operations of a gradient{_of(row)}, T {row['length']:,}, in chunks"
        )
        yield Line(what, chain, tables.number)


def _of(row: Mapping[str, Any]) -> str:
    """How many layers it was, where not all of `base`."""
    return "" if row["layers"] == LAYERS else f" of {row['layers']} layer(s)"


def _long_range(results: Results) -> Iterator[Line]:
    students = results.get("recall", [])
    if students:
        for curve, length in (
            ("same", "rows as in training"),
            ("longer", f"rows {LONGER} times as long"),
        ):
            for pairs in students[0]["accuracy"][curve]:
                what = f"recall of {pairs} pairs, {length}"
                yield _share(what, _matched(students, curve, pairs))
    for task, students in results.get("distance", {}).items():
        longest = list(students[0]["accuracy"]["accuracy"])[-1]
        for number in (str(int(longest) // LONGER), longest):
            what = f"{task}, {'distance' if task == 'needle' else 'rows of'} {number} tokens"
            what += f", {LONGER} times as far as learned" if number == longest else ""
            yield _share(what, _matched(students, "accuracy", number))


def _share(what: str, values: Mapping[str, float | None]) -> Line:
    """A share of answers that are right; a hundredth less is as good."""
    return Line(what, values, tables.share, more_is_better=True, as_ratio=False, equal=0.01)


def _matched(students: Sequence[Any], curve: str, number: str) -> dict[str, float | None]:
    """The accuracy of attention, and of the recurrence that has as many parameters."""
    theirs = next(student for student in students if student["name"] == ATTENTION)
    ours = min(
        (student for student in students if student["name"].startswith(RECURRENCE)),
        key=lambda student: abs(student["parameters"] - theirs["parameters"]),
    )
    sides = {RECURRENCE: ours, ATTENTION: theirs}
    return {side: student["accuracy"][curve][number] for side, student in sides.items()}


def _memory(results: Results) -> Iterator[Line]:
    rows = results.get("memory", [])
    for row in rows[:: max(len(rows) - 1, 1)]:
        what = f"MB of a train step{_of(row)} on one row, T {row['length']:,}"
        yield Line(what, row["training_bytes"], _megabytes)
    for row in rows[:: max(len(rows) - 1, 1)]:
        what = f"kB of state{_of(row)} to go on writing from, after {row['length']:,} tokens"
        yield Line(what, row["state_bytes"], lambda size: tables.number(size / 1e3))


def _cost(results: Results) -> Iterator[Line]:
    cost = results.get("cost")
    if cost is None:
        return
    for kind in ("training", "reading", "writing"):
        by_length = {n: {s: v[s][kind] for s in SIDES} for n, v in cost["flops_per_token"].items()}
        for length in (min(by_length, key=int), max(by_length, key=int)):
            what = f"million operations a token, {kind}, T {int(length):,}"
            yield Line(what, by_length[length], lambda flops: tables.number(flops / 1e6, 1))
    for kind in ("reading", "writing"):
        by_length = cost[f"{kind}_us"]
        for length in (min(by_length, key=int), max(by_length, key=int)):
            what = f"tokens/s, {kind}, T {int(length):,}"
            rates = {side: 1e6 / us for side, us in by_length[length].items()}
            yield Line(what, rates, tables.number, True)


def _scalability(results: Results) -> Iterator[Line]:
    rows = results.get("communication", [])
    most = max((row["devices"] for row in rows), default=0)
    for row in rows:
        what = f"kB to a device for a layer, T {row['length']:,} over {row['devices']} devices"
        if row["devices"] == most:
            yield Line(what, row["bytes"], lambda size: tables.number(size / 1e3))
    corpus = results.get("corpus")
    if corpus:
        seeds = len(corpus[RECURRENCE]["bits_per_byte"])
        what = f"held-out bits/byte after {corpus['tokens']:,} bytes, mean of {seeds} seed(s)"
        means = {side: corpus[side]["mean"] for side in SIDES}
        spreads = {side: corpus[side]["spread"] for side in SIDES}
        equal = max(spreads.values())
        yield Line(what, means, _bits, as_ratio=False, equal=equal, says_who=seeds > 1)
        if seeds > 1:
            what = "largest less smallest of them: means that differ by no more count as equal"
            yield Line(what, spreads, _bits, as_ratio=False, equal=1)


def _bits(value: float) -> str:
    return f"{value:.3f}"


def _interpretability(results: Results) -> Iterator[Line]:
    layers = results.get("interpretability", [])
    for key, what in (
        ("operator_error", "error of weights times values against the definition, worst layer"),
        ("layer_error", "the same after norm, gate and projection"),
    ):
        if layers:
            worst = max(layer[key] for layer in layers)
            yield Line(what, {RECURRENCE: worst, ATTENTION: None}, lambda error: f"{error:.1e}")


_ASPECTS: Mapping[str, Callable[[Results], Iterator[Line]]] = {
    "parallelism": _parallelism,
    "long-range dependency": _long_range,
    "memory": _memory,
    "computation": _cost,
    "scalability": _scalability,
    "interpretability": _interpretability,
}


def crossings(cost: Mapping[str, Any], training: Sequence[Mapping[str, Any]]) -> str:
    """From which length on attention costs more than the recurrence, one line per measure."""
    curves: dict[str, Mapping[str, Mapping[str, float]]] = {
        f"{kind}, operations": {
            n: {s: v[s][kind] for s in SIDES} for n, v in cost["flops_per_token"].items()
        }
        for kind in ("training", "reading", "writing")
    }
    if training:
        curves["training, time"] = {
            str(row["length"]): {
                RECURRENCE: row["us_per_token"]["ours"],
                ATTENTION: row["us_per_token"][ATTENTION],
            }
            for row in training
        }
    curves |= {f"{kind}, time": cost[f"{kind}_us"] for kind in ("reading", "writing")}
    rows = []
    for name, curve in curves.items():
        at = crossing(curve, slower=ATTENTION, faster=RECURRENCE)
        least, most = min(map(int, curve)), max(map(int, curve))
        where = f"T {at:,.0f}" if at else f"at every T measured, from {least:,} on"
        rows.append([name, f"nowhere up to T {most:,}" if at is None else where])
    return markdown(["attention costs more than SimpleRNN", "from"], rows)


def student_table(students: Sequence[Mapping[str, Any]], curve: str, along: str) -> str:
    """Accuracy of every student."""
    numbers = list(students[0]["accuracy"][curve])
    rows = [
        [
            student["name"],
            tables.number(student["parameters"]),
            tables.number(student["state_bytes"]),
            student["best"],
            ", ".join(f"{loss:.3f}" for loss in student["losses"].values()),
            *(tables.share(student["accuracy"][curve][number]) for number in numbers),
        ]
        for student in students
    ]
    headings = ["model", "parameters", "state bytes in training", "best rate", "loss by rate"]
    return markdown([*headings, *(f"{along} {number}" for number in numbers)], rows)


def _megabytes(size: float) -> str:
    return tables.number(size / 1e6)
