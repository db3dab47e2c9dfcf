"""Files of a corpus, written and read back by tests."""

import contextlib
import json
import random

from benchmarks.stress.mutation import mutated
from simplernn_jax.config import DataConfig
from simplernn_jax.data import open_corpus
from simplernn_jax.errors import UserError


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def records(*values):
    """JSONL of these values."""
    return "".join(json.dumps(value) + "\n" for value in values)


def read_all(source, **settings):
    """Texts of all documents by name."""
    corpus = open_corpus(DataConfig(source=str(source), **settings))
    texts = {
        document.name: "".join(piece.text for piece in document.pieces)
        for document in corpus.documents()
    }
    assert corpus.bytes_read == corpus.total_bytes
    return texts


def read_damaged(path, number, **settings):
    """Texts of the file after each of `number` damages; raises anything but a `UserError`."""
    whole = path.read_bytes()
    for seed in range(number):
        path.write_bytes(mutated(whole, random.Random(seed)))
        with contextlib.suppress(UserError):
            yield read_all(path, **settings)
    path.write_bytes(whole)


def truncations(path, step=101):
    """Cuts the file to ever more of its bytes."""
    whole = path.read_bytes()
    for size in range(1, len(whole), step):
        path.write_bytes(whole[:size])
        yield


def talk(*pairs, system=None):
    """A conversation of questions and answers."""
    found = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in pairs:
        found.append({"role": "user", "content": question})
        if answer is not None:
            found.append({"role": "assistant", "content": answer})
    return found
