"""Files of a corpus, written and read back by tests."""

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
    """Texts of all documents by name."""
    corpus = open_corpus(DataConfig(source=str(source), **settings))
    texts = {
        document.name: "".join(piece.text for piece in document.pieces)
        for document in corpus.documents()
    }
    assert corpus.bytes_read == corpus.total_bytes
    return texts


def talk(*pairs, system=None):
    """A conversation of questions and answers."""
    found = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in pairs:
        found.append({"role": "user", "content": question})
        if answer is not None:
            found.append({"role": "assistant", "content": answer})
    return found
