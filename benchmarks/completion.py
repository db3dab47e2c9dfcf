"""Completion at a cursor: how often the rest of the line is right, and the time of a keystroke.

The files are the held-out ones of the runs. A suggestion is what a server answers to ``/infill``:
greedy, up to the end of the line, and right if it is the rest of the line.

``exact``: cursors at characters of random lines that are not spaces. ``saved``: lines are typed
anew, and as soon as the suggestion is right, one key accepts it; the keys that this saves, as a
share of all characters. The n-gram model suggests what followed the longest known context most
often.

``keystroke``: clients type other text at the pace of a fast typist, and each character is a request
for about `KEYSTROKE_BYTES`; the first request at a place is left out.
"""

import asyncio
import dataclasses
import functools
import itertools
import json
import random
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from simplernn_jax import load_model
from simplernn_jax.data import prepare_corpus
from simplernn_jax.errors import UserError

from .ngrams import ORDER, NGrams
from .serving import fetch, percentiles, serving
from .tables import Row, Table
from .train_steps import count_parameters, document_texts

LONGEST = 100
"""Bytes of a line at most."""
CONTEXT = 4096
"""Characters before the line, and after it."""
CURSORS, LINES = 500, 100
CLIENTS = (1, 8)
KEYSTROKE_BYTES = 32
PLACES, TYPED, PACE = 16, 120, 0.1
"""Places where text is typed, its characters at each, and the mean seconds between two."""


class Cursor(NamedTuple):
    """A line of a file without its newline, the text around it, and a cursor in it."""

    before: str
    line: str
    after: str
    at: int
    """Characters of the line before the cursor."""


class Suggestion(NamedTuple):
    """What is suggested at a cursor, and how long it took."""

    cursor: Cursor
    text: str
    seconds: float = 0.0

    @property
    def is_right(self) -> bool:
        """True if it is the rest of the line."""
        return self.text == self.cursor.line[self.cursor.at :]


def run(workdirs: Sequence[str]) -> Iterator[Table]:
    """Tables of the models in `workdirs`, which hold out the same text."""
    configs = {workdir: load_model(workdir)[1:] for workdir in workdirs}
    if not configs:
        raise UserError("--workdirs: names no run; train some with configs/complete.py")
    config = configs[workdirs[0]][1]
    held_out = {
        (config.data.source, config.data.validation_fraction, config.train.seed)
        for _, config in configs.values()
    }
    if len(held_out) > 1:
        raise UserError("--workdirs: runs that hold out other text: their source or seed differs")
    # Without infilling, the same files are held out.
    plain = dataclasses.replace(config.data, tokenizer="byte", fim_rate=0.0)
    with tempfile.TemporaryDirectory() as folder:  # mapped files outlive their names
        corpus = prepare_corpus(plain, config.train.seed, folder)
    if corpus.validation is None:
        raise UserError("--workdirs: runs that hold out no text; train with a validation_fraction")
    files = document_texts(corpus.validation, corpus.tokenizer)
    somewhere = [[cursor] for cursor in choose(files, CURSORS)]
    typed = type_anew(choose(files, LINES, 1))
    # Places of their own for each measurement: the server caches what it has seen.
    timed = [type_anew(choose_places(files, seed)) for seed in CLIENTS]
    quality: list[Row] = []
    latency: list[Row] = []
    for workdir, (tokenizer, config) in configs.items():
        row: Row = {"model": workdir, "parameters": count_parameters(config)}
        with serving(workdir, f"--slots={CLIENTS[-1]}") as (_, url):
            for suffix in ("yes", "no"):
                ask_all = functools.partial(ask, url, CLIENTS[-1], LONGEST + 1, suffix == "yes")
                row |= {"suffix": suffix} | compare(ask_all(somewhere), ask_all(typed))
                quality.append({**row})
        sample = "".join(files)[: 1 << 20]
        per_byte = len(tokenizer.encode(sample)) / len(sample.encode())
        num_tokens = round(KEYSTROKE_BYTES * per_byte)
        for weights in ("as trained", "int8"):
            quantize = [] if weights == "as trained" else [f"--quantize={weights}"]
            with serving(workdir, f"--slots={CLIENTS[-1]}", *quantize) as (_, url):
                for clients, places in zip(CLIENTS, timed, strict=True):
                    found = ask(url, clients, num_tokens, True, places, PACE)
                    row = {"model": workdir, "weights": weights, "clients": clients}
                    times = [1e3 * x.seconds for x in found if x.cursor.at]
                    latency.append(row | percentiles("keystroke, ms", times))
    ngrams = NGrams(corpus.train.tokens)
    by_ngrams = ([finish_line(ngrams, x) for x in itertools.chain(*p)] for p in (somewhere, typed))
    quality.append({"model": f"{ORDER}-gram", "suffix": "no"} | compare(*by_ngrams))
    yield Table(f"completion: {CURSORS} cursors, {LINES} lines", quality)
    yield Table("completion: latency", latency)


def choose(files: Sequence[str], number: int, seed: int = 0) -> list[Cursor]:
    """Choose cursors at characters of random lines, which have at most `LONGEST` bytes."""
    draw = random.Random(seed)
    lines = [(text, line) for text in files for line in re.finditer(r"(?m)^.*\S.*$", text)]
    lines = [(text, line) for text, line in lines if len(line[0].encode()) <= LONGEST]
    found = []
    for text, line in draw.choices(lines, k=number):
        at = draw.choice([n for n, character in enumerate(line[0]) if not character.isspace()])
        found.append(cut_out(text, *line.span(), at))
    return found


def choose_places(files: Sequence[str], seed: int) -> list[Cursor]:
    """Choose lines from which on text is typed; it takes the place of a line."""
    draw = random.Random(seed)
    found = []
    long = [text for text in files if len(text) > TYPED]
    if not long:
        raise UserError(f"--workdirs: runs that hold out no file of over {TYPED} characters")
    for text in draw.choices(long, k=PLACES):
        start = text.rfind("\n", 0, draw.randrange(len(text) - TYPED)) + 1
        found.append(cut_out(text, start, start + TYPED, 0))
    return found


def cut_out(text: str, start: int, end: int, at: int) -> Cursor:
    """Make the cursor in a part of a text."""
    return Cursor(text[max(0, start - CONTEXT) : start], text[start:end], text[end:][:CONTEXT], at)


def type_anew(cursors: Sequence[Cursor]) -> list[list[Cursor]]:
    """Put a cursor before each character of each line."""
    return [[x._replace(at=at) for at in range(len(x.line))] for x in cursors]


def ask(
    url: str,
    clients: int,
    num_tokens: int,
    with_suffix: bool,
    places: Sequence[Sequence[Cursor]],
    pace: float = 0.0,
) -> list[Suggestion]:
    """Ask a server for suggestions; clients share the lists of places.

    `pace` is the mean of the seconds between two requests of a client, if answers take less.
    """

    async def client(number: int) -> list[Suggestion]:
        found, draw, due = [], random.Random(number), time.perf_counter()
        for cursor in itertools.chain(*places[number::clients]):
            due += pace * draw.uniform(0.5, 1.5)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            fields: Row = {"n_predict": num_tokens, "stop": ["\n"]}
            fields |= {"input_prefix": cursor.before, "prompt": cursor.line[: cursor.at]}
            fields |= {"input_suffix": cursor.after if with_suffix else ""}
            start = time.perf_counter()
            status, body = await fetch(url, "POST", "/infill", fields)
            seconds = time.perf_counter() - start
            if status != 200:
                raise ConnectionError(f"/infill answered {body!r}")
            found.append(Suggestion(cursor, json.loads(body)["content"], seconds))
        return found

    async def all_clients() -> list[list[Suggestion]]:
        return await asyncio.gather(*map(client, range(clients)))

    return [*itertools.chain(*asyncio.run(all_clients()))]


def finish_line(ngrams: NGrams, cursor: Cursor) -> Suggestion:
    """Suggest the rest of a line by an n-gram model."""
    text = start = (cursor.before + cursor.line[: cursor.at]).encode()
    while len(text) - len(start) <= LONGEST and not text[len(start) :].endswith(b"\n"):
        text += bytes([ngrams.predict(text[-ORDER:])])
    return Suggestion(cursor, text[len(start) :].decode("utf-8", "replace").split("\n")[0])


def compare(somewhere: Sequence[Suggestion], typed: Sequence[Suggestion]) -> Row:
    """Columns ``exact``, of cursors, and ``saved``, of lines that are typed."""
    keys = {x.cursor._replace(at=0): len(x.cursor.line) for x in typed}
    length = sum(keys.values())
    for found in typed:
        if found.is_right:  # the key that accepts it counts
            line = found.cursor._replace(at=0)
            keys[line] = min(keys[line], found.cursor.at + 1)
    exact = float(np.mean([found.is_right for found in somewhere]))
    return {"exact": exact, "saved": 1 - sum(keys.values()) / length}
