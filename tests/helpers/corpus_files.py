"""Files of a corpus and of its tokens, written and read back by tests."""

import collections
import json

from simplernn_jax.config import DataConfig
from simplernn_jax.data import open_corpus


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def records(*values):
    """JSONL of these values."""
    return "".join(json.dumps(value) + "\n" for value in values)


def read_all(source, **settings):
    """Texts of all documents with text, by name."""
    corpus = open_corpus(DataConfig(source=str(source), **settings))
    pieces = collections.defaultdict(list)
    for name, piece in corpus.pieces():
        pieces[name].append(piece)
    assert corpus.bytes_read == corpus.total_bytes
    for found in pieces.values():
        ends = [(piece.begins, piece.ends) for piece in found]
        assert ends == [(n == 0, n == len(found) - 1) for n in range(len(found))]
    return {name: "".join(piece.text for piece in found) for name, found in pieces.items()}


def talk(*pairs, system=None):
    """A conversation of questions and answers."""
    found = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in pairs:
        found.append({"role": "user", "content": question})
        if answer is not None:
            found.append({"role": "assistant", "content": answer})
    return found


def stores(cache):
    """All that is in a cache folder, except locks and records."""
    return [path for path in cache.iterdir() if path.suffix not in (".lock", ".json")]


def contents(cache):
    """Files of the one store in a cache folder, by name."""
    (store,) = stores(cache)
    return {path.name: path.read_bytes() for path in store.iterdir()}
