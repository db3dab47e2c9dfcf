"""Completion at a cursor: how often the rest of the line is right, and the time of a keystroke.

The files are the held-out ones of the runs. A suggestion is greedy, ends with the line, and is
right if it is the rest of the line.

``exact``: cursors at random characters that are not spaces. ``saved``: lines are typed anew, and as
soon as the suggestion is right, one key accepts it; the keys that this saves, as a share of all
characters. Without the suffix, the same model continues the text before the cursor. The n-gram
model suggests what followed the longest known context most often.

``keystroke``: clients type lines, and each character is a request to ``/infill``. ``jump``: the
first request at a place.
"""

import asyncio
import dataclasses
import itertools
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from simplernn_jax import load_model
from simplernn_jax.data import Tokenizer, prepare_corpus
from simplernn_jax.data.infilling import infill_ids
from simplernn_jax.data.tokenizer import ids_without_text
from simplernn_jax.errors import UserError
from simplernn_jax.inference import fork_state, generate
from simplernn_jax.models import LanguageModel

from .serving import connected, percentiles, request, serving
from .tables import Row, Table
from .train_steps import count_parameters, document_texts

LONGEST = 100
"""Bytes of a line at most."""
CONTEXT = 4096
"""Characters before the line, and after it."""
ORDER = 8
CLIENTS = (1, 8)
BATCH = 16
"""Places of a line at which a model suggests together."""
_INFILL = {"n_predict": 32, "temperature": 0, "stop": ["\n"], "prompt": ""}


class Cursor(NamedTuple):
    """A line of a file without its newline, the text around it, and a cursor in it."""

    before: str
    line: str
    after: str
    at: int
    """Characters of the line before the cursor."""


Suggest = Callable[[Cursor, Sequence[int]], list[str]]
"""Suggests the rest of the line of a cursor at several places in it."""


def run(workdirs: Sequence[str], cursors: int, lines: int) -> Iterator[Table]:
    """Tables of the models in `workdirs`; `UserError` unless they hold out the same text."""
    loaded = {workdir: load_model(workdir) for workdir in workdirs}
    if not loaded:
        raise UserError("--workdirs: names no run; train some with configs/complete.py")
    kept = ("source", "split", "validation_fraction", "all_files")
    texts = {(*(getattr(c.data, x) for x in kept), c.train.seed) for *_, c in loaded.values()}
    config = next(iter(loaded.values()))[2]
    if len(texts) > 1 or not config.data.validation_fraction:
        raise UserError("--workdirs: give runs of the same text, which hold out a part of it")
    # Without infilling, the same files are held out.
    plain = dataclasses.replace(config.data, tokenizer="byte", fim_rate=0.0)
    with tempfile.TemporaryDirectory() as folder:  # mapped files outlive their names
        corpus = prepare_corpus(plain, config.train.seed, folder)
    assert corpus.validation is not None
    files = document_texts(corpus.validation, corpus.tokenizer)
    somewhere = choose(files, cursors)
    typed = [cursor._replace(at=0) for cursor in choose(files, lines)]
    rows: list[Row] = []
    for workdir, (model, tokenizer, config) in loaded.items():
        for has_suffix in (True, False):
            suggest = of_model(model, tokenizer, has_suffix=has_suffix)
            row: Row = {"model": workdir, "suffix": "yes" if has_suffix else "no"}
            row |= {"parameters": count_parameters(config)}
            rows.append(row | measure(suggest, somewhere, typed))
    suggest = of_ngram("\0".join(document_texts(corpus.train, corpus.tokenizer)).encode())
    rows.append({"model": f"{ORDER}-gram", "suffix": "no"} | measure(suggest, somewhere, typed))
    yield Table(f"completion: {cursors:,} cursors, {lines:,} lines", rows)
    rows = [keystrokes(workdir, clients, typed) for workdir in workdirs for clients in CLIENTS]
    yield Table("completion: latency", rows)


def choose(files: Sequence[str], number: int) -> list[Cursor]:
    """Choose cursors at random characters, of lines of at most `LONGEST` bytes."""
    draw = random.Random(0)
    ends = list(itertools.accumulate(map(len, files)))
    found: list[Cursor] = []
    for _ in range(1000 * number):
        place = draw.randrange(ends[-1])
        index = int(np.searchsorted(ends, place, side="right"))
        text, at = files[index], place - (ends[index] - len(files[index]))
        start = text.rfind("\n", 0, at) + 1
        stop = text.find("\n", at) if "\n" in text[at:] else len(text)
        if not text[at].isspace() and len(text[start:stop].encode()) <= LONGEST:
            before, after = text[max(0, start - CONTEXT) : start], text[stop : stop + CONTEXT]
            found.append(Cursor(before, text[start:stop], after, at - start))
            if len(found) == number:
                return found
    raise UserError("--workdirs: the held-out text has too few lines")


def of_model(model: LanguageModel, tokenizer: Tokenizer, *, has_suffix: bool) -> Suggest:
    """Suggestions of a model, with or without the text after the cursor."""
    banned = sorted(ids_without_text(tokenizer, model.config.vocab_size))

    def prompt(cursor: Cursor, at: int) -> np.ndarray:
        text = cursor.before + cursor.line[:at]
        if has_suffix:
            return infill_ids(tokenizer, text, cursor.after)
        return np.append(tokenizer.bos_id, tokenizer.encode(text))

    def suggest(cursor: Cursor, places: Sequence[int]) -> list[str]:
        size = BATCH if len(places) > 1 else 1  # programs are compiled for few sizes
        found: list[str] = []
        for first in range(0, len(places), size):
            some = [*places[first : first + size]]
            prompts = [prompt(cursor, at) for at in some + some[-1:] * (size - len(some))]
            shared = max(1, min(map(len, prompts)) - 1)
            while any(p[:shared].tolist() != prompts[0][:shared].tolist() for p in prompts):
                shared -= 1
            state = generate(model, [prompts[0][:shared]], max_new_tokens=0).state
            texts = generate(
                model,
                [p[shared:] for p in prompts],
                state=fork_state(state, size),
                # A token is a byte at least, and one more tells whether the line ends.
                max_new_tokens=len(cursor.line[some[0] :].encode()) + 1,
                eos_id=tokenizer.eos_id,
                banned_ids=banned,
            ).sequences()
            found += [tokenizer.decode(ids).split("\n")[0] for ids in texts[: len(some)]]
        return found

    return suggest


def of_ngram(text: bytes) -> Suggest:
    """Suggestions of an n-gram model of bytes with backoff."""
    data = np.frombuffer(text, np.uint8).astype(np.uint64)
    tables = []
    for length in range(ORDER - 1, -1, -1):
        grams = np.zeros(len(data) - length, np.uint64)
        for offset in range(length + 1):
            grams = (grams << np.uint64(8)) | data[offset : len(data) - length + offset]
        grams, counts = np.unique(grams, return_counts=True)
        order = np.lexsort((counts, grams >> np.uint64(8)))
        contexts = grams[order] >> np.uint64(8)
        is_best = np.append(contexts[1:] != contexts[:-1], True)
        tables.append((length, contexts[is_best], (grams[order] & np.uint64(255))[is_best]))

    def next_byte(before: bytes) -> int:
        for length, contexts, best in tables:
            context = int.from_bytes(before[len(before) - length :])
            place = int(np.searchsorted(contexts, np.uint64(context)))
            if len(before) >= length and place < len(contexts) and contexts[place] == context:
                return int(best[place])
        raise AssertionError("the empty context is known")

    def suggest(cursor: Cursor, places: Sequence[int]) -> list[str]:
        found = []
        for at in places:
            text = start = (cursor.before + cursor.line[:at]).encode()
            while len(text) - len(start) <= LONGEST and not text[len(start) :].endswith(b"\n"):
                text += bytes([next_byte(text[-ORDER:])])
            found.append(text[len(start) :].decode("utf-8", "replace").split("\n")[0])
        return found

    return suggest


def measure(suggest: Suggest, somewhere: Sequence[Cursor], typed: Sequence[Cursor]) -> Row:
    """Columns ``exact``, of cursors, and ``saved``, of lines that are typed."""
    exact = float(np.mean([suggest(x, [x.at]) == [x.line[x.at :]] for x in somewhere]))
    keys = 0
    for cursor in typed:
        line = cursor.line
        rests = enumerate(suggest(cursor, range(len(line))))
        # The key that accepts the suggestion counts.
        keys += min([len(line), *(at + 1 for at, rest in rests if rest == line[at:])])
    return {"exact": exact, "saved": 1 - keys / sum(len(cursor.line) for cursor in typed)}


def keystrokes(workdir: str, clients: int, typed: Sequence[Cursor]) -> Row:
    """Latencies of clients that type the lines at once; each has its own."""
    jumps: list[float] = []
    seconds: list[float] = []

    async def client(url: str, lines: Sequence[Cursor]) -> None:
        async with connected(url) as (reader, writer):
            for cursor in lines:
                for at in range(len(cursor.line)):
                    prefix = cursor.before + cursor.line[:at]
                    fields = {**_INFILL, "input_prefix": prefix, "input_suffix": cursor.after}
                    start = time.perf_counter()
                    writer.write(request("POST", "/infill", fields))
                    head = await reader.readuntil(b"\r\n\r\n")
                    body = await reader.readexactly(int(re.findall(rb"length: (\d+)", head)[0]))
                    if not head.startswith(b"HTTP/1.1 200 "):
                        raise ConnectionError(f"/infill answered {body!r}")
                    (seconds if at else jumps).append(time.perf_counter() - start)

    async def all_clients(url: str, lines: Sequence[Cursor]) -> None:
        await asyncio.gather(*(client(url, lines[n::clients]) for n in range(clients)))

    with serving(workdir, f"--slots={clients}") as (_, url):
        asyncio.run(all_clients(url, typed[:clients]))  # warms up
        jumps.clear()
        seconds.clear()
        asyncio.run(all_clients(url, typed[clients:]))
    row: Row = {"model": workdir, "clients": clients}
    row |= percentiles("keystroke, ms", [1e3 * x for x in seconds])
    return row | percentiles("jump, ms", [1e3 * x for x in jumps])
