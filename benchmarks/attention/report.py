"""What was measured, as table.md and pictures beside it."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import tables
from benchmarks.attention import distance, pictures, recall, table
from benchmarks.attention.corpus import LENGTH
from benchmarks.attention.sides import SIDES
from benchmarks.attention.students import LAYERS, WIDTH
from simplernn_jax.files import write_file


class Section(NamedTuple):
    """A part of the page; also the name of its picture."""

    title: str
    text: str
    picture: bytes | None = None


def write(out: Path, results: Mapping[str, Any]) -> str:
    """Writes the page and the pictures of all that is in `results`; returns the first table."""
    measured = {name: part["measured"] for name, part in results.items()}
    first = table.six_aspects(measured)
    parts = [f"# SimpleRNN and self-attention, measured\n\n{_WHAT}\n\n{first}"]
    for name, sections_of in _SECTIONS.items():
        if name not in measured:
            continue
        for section in sections_of(measured):
            part = f"## {section.title}\n\n"
            if section.picture is not None:
                file = f"{section.title.replace(' ', '_')}.png"
                write_file(str(out / file), section.picture)
                part += f"![{section.title}]({file})\n\n"
            parts.append(part + section.text)
    parts.append(f"## how it was measured\n\n{_provenance(results)}")
    write_file(str(out / "table.md"), "\n".join(parts).encode("utf-8"))
    return first


_WHAT = f"""The same block, data, sizes and training on both sides: `configs/base.py` and
`configs/attention.py`, as many parameters; attention sees the whole row. On synthetic tasks, small
models of the same kind, one training each at every rate tried, of which the one with the lowest
loss in training is tested; the recurrence of the first table is the one with as many parameters as
attention, its state {WIDTH} x {WIDTH}."""


def _parallelism(measured: Mapping[str, Any]) -> Iterator[Section]:
    rows = measured["parallelism"]
    names = list(rows[0]["us_per_token"])
    lines = [
        [
            f"{row['length']:,}",
            *(tables.number(row["us_per_token"][name], 1) for name in names),
            *(tables.number(chain) for chain in row["chain"].values()),
        ]
        for row in rows
    ]
    headings = ["T", *(f"{name}, us a token" for name in names)]
    headings += [f"{name}, longest chain" for name in rows[0]["chain"]]
    text = (
        table.markdown(headings, lines)
        + "\nOf the longest chain of operations, each needs the one before. `ours` is what "
        "training runs; on a CPU that goes token by token as `scan`, in one function.\n"
    )
    yield Section("parallelism", text, pictures.draw_parallelism(rows))


def _recall(measured: Mapping[str, Any]) -> Iterator[Section]:
    students = measured["recall"]
    text = (
        "Multi-query associative recall (arXiv:2312.04927): pairs of key and value, then some of "
        "the keys again, anywhere; the answer is the value of the key. There are "
        f"{recall.SYMBOLS} keys and {recall.SYMBOLS} values; models have {LAYERS} layers of width "
        f"{WIDTH} and one head. Learned first from rows of {recall.EASY.length} tokens with up to "
        f"{max(recall.EASY.pairs)} pairs, then from rows of all numbers of pairs. Dotted: what a "
        "guess gets.\n\n"
    )
    text += table.student_table(students, "same", "pairs") + "\nRows four times as long:\n\n"
    text += table.student_table(students, "longer", "pairs")
    yield Section("recall", text, pictures.draw_recall(students))


def _distance(measured: Mapping[str, Any]) -> Iterator[Section]:
    tasks = measured["distance"]
    text = (
        f"Copying (arXiv:1511.06464, section 5.1): {distance.COUNT} symbols, blanks, then the "
        "symbols in their order. Selective copying (arXiv:2312.00752): the symbols lie anywhere "
        "among the blanks. A needle: one value in noise, asked for at given distances. Learned "
        f"from rows of {distance.LENGTH} tokens, and distances up to "
        f"{max(distance.LEARNED_DISTANCES)}; every other length, shorter or longer, was never "
        "seen. Dotted: the longest of the training, and what a guess gets.\n\n"
    )
    for name, students in tasks.items():
        along = "distance" if name == "needle" else "T"
        text += f"{name}:\n\n{table.student_table(students, 'accuracy', along)}\n"
    yield Section("copying and distance", text, pictures.draw_distance(tasks))


def _memory(measured: Mapping[str, Any]) -> Iterator[Section]:
    rows = measured["memory"]
    lines = [
        [
            f"{row['length']:,}",
            *(tables.number(row["training_bytes"][side] / 1e6, 1) for side in SIDES),
            *(tables.number(row["state_bytes"][side] / 1e3, 1) for side in SIDES),
        ]
        for row in rows
    ]
    headings = ["T", *(f"{side}, train step MB" for side in SIDES)]
    headings += [f"{side}, state kB" for side in SIDES]
    yield Section("memory", table.markdown(headings, lines), pictures.draw_memory(rows))


def _cost(measured: Mapping[str, Any]) -> Iterator[Section]:
    cost = measured["cost"]
    lines = [
        [kind, f"{int(length):,}", *(tables.number(sides[side][kind] / 1e6, 1) for side in SIDES)]
        for kind in ("training", "reading", "writing")
        for length, sides in cost["flops_per_token"].items()
    ]
    text = table.markdown(["million operations a token", "T", *SIDES], lines) + "\n"
    lines = [
        [kind, f"{int(length):,}", *(tables.number(us[side], 1) for side in SIDES)]
        for kind in ("reading", "writing")
        for length, us in cost[f"{kind}_us"].items()
    ]
    text += table.markdown(["microseconds a token", "T", *SIDES], lines)
    text += (
        "\nOperations are counted in the program before XLA, whose own account takes the body of a "
        "loop once and knows nothing of functions in C; the recurrence is counted in chunks in "
        "training and reading. Reading is one forward pass; writing is one stream, for which XLA's "
        "CPU backend copies attention's keys and values once more for every token.\n\n"
    )
    text += table.crossings(cost, measured.get("parallelism", []))
    yield Section("computation", text, pictures.draw_cost(cost))


def _communication(measured: Mapping[str, Any]) -> Iterator[Section]:
    rows = measured["communication"]
    lines = [
        [
            f"{row['length']:,}",
            str(row["devices"]),
            *(tables.number(row["bytes"][side] / 1e3, 1) for side in SIDES),
        ]
        for row in rows
    ]
    text = table.markdown(["T", "devices", *(f"{side}, kB" for side in SIDES)], lines)
    text += (
        "\nReceived by a device in a train step on one row whose time lies over the devices, for "
        "one layer, read from the compiled program. The gradients of the parameters come on "
        "top, the same for both whatever the length.\n"
    )
    yield Section("communication", text, pictures.draw_communication(rows))


def _corpus(measured: Mapping[str, Any]) -> Iterator[Section]:
    corpus = measured["corpus"]
    lines = [
        [
            side,
            tables.number(corpus[side]["parameters"]),
            f"{corpus[side]['best_rate']:g}",
            ", ".join(f"{rate} {loss:.3f}" for rate, loss in corpus[side]["rates"].items()),
            ", ".join(f"{loss:.3f}" for loss in corpus[side]["bits_per_byte"]),
            f"{corpus[side]['mean']:.3f}",
        ]
        for side in SIDES
    ]
    headings = ["side", "parameters", "best rate", "bits/byte by rate, first seed"]
    text = table.markdown([*headings, "bits/byte by seed", "mean"], lines)
    text += (
        f"\nHeld-out text of the standard library after {corpus['tokens']:,} bytes of training. It "
        "is read document after document, the state carried; attention sees the last "
        f"{LENGTH} bytes, as in training. The rate is chosen by the same text.\n"
    )
    yield Section("loss on text", text)


def _interpretability(measured: Mapping[str, Any]) -> Iterator[Section]:
    lines = [
        [str(number), f"{layer['operator_error']:.1e}", f"{layer['layer_error']:.1e}"]
        for number, layer in enumerate(measured["interpretability"], 1)
    ]
    text = table.markdown(["layer", "error of the map", "error of the layer's output"], lines)
    text += (
        "\nThe recurrence has an exact attention map too: weights times values give its output to "
        "this relative error. Attention's weights are its softmax; nothing is to be derived.\n"
    )
    yield Section("interpretability", text)


_SECTIONS: Mapping[str, Callable[[Mapping[str, Any]], Iterator[Section]]] = {
    "parallelism": _parallelism,
    "recall": _recall,
    "distance": _distance,
    "memory": _memory,
    "cost": _cost,
    "communication": _communication,
    "corpus": _corpus,
    "interpretability": _interpretability,
}


def _provenance(results: Mapping[str, Any]) -> str:
    rows = [
        [
            name,
            "quick" if part["quick"] else "full",
            f"{part['seconds']:,.0f}",
            part["machine"]["processor"],
            str(part["machine"]["cores"]),
            part["machine"]["jax"],
            part["machine"]["commit"],
        ]
        for name, part in results.items()
    ]
    headings = ["measurement", "form", "seconds", "processor", "cores", "jax", "commit"]
    return table.markdown(headings, rows)
