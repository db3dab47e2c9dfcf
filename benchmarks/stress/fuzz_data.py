"""Readers of data for `fuzz`: texts, records, conversations, templates and tokenizers."""

import gzip
import importlib.util
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import zstandard
from tokenizers import decoders, models, pre_tokenizers

from simplernn_jax.config import DataConfig
from simplernn_jax.data.chat_template import ChatTemplate, load_template
from simplernn_jax.data.corpora import open_corpus
from simplernn_jax.data.mixture import parse_mixture
from simplernn_jax.data.tokenizer import ByteTokenizer, load_tokenizer, tokenizer_from_json
from simplernn_jax.errors import UserError

TEXT = "The naïve café — sells 13 кофе and 茶.\n\tIt <s> closes </s> at five 🙂!\r\n"
CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo\n"},
]
SHAREGPT = {"messages": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BYTES = ByteTokenizer()


class Reader(NamedTuple):
    """Something that reads input."""

    name: str
    examples: Sequence[bytes]
    """Valid inputs."""
    read: Callable[[bytes], object]
    """Use the input; anything but a rejection is a defect, wrong results included."""


def of_file(
    name: str, path: Path, read: Callable[[], object], examples: Sequence[bytes] = ()
) -> Reader:
    """A reader of a file, whose present content is the example by default."""

    def write_and_read(content: bytes) -> None:
        path.write_bytes(content)
        read()

    return Reader(name, examples or [path.read_bytes()], write_and_read)


def data_readers(folder: Path) -> list[Reader]:
    """All readers of data; their files are in `folder`."""

    def render(content: bytes) -> None:
        template = ChatTemplate(load_template(as_text(content)))
        template.render(CHAT, add_generation_prompt=True)
        list(template.pieces([CHAT], only_assistant=True))

    return [
        *_text_readers(folder),
        *_tokenizer_readers(folder),
        Reader("mixture", [b"a/:0.7,b.jsonl:0.3"], lambda x: parse_mixture(as_text(x))),
        Reader("chat template", [CHATML.encode(), load_template("roles").encode()], render),
    ]


def _text_readers(folder: Path) -> list[Reader]:
    text, lines = TEXT.encode(), _lines({"text": TEXT, "n": 1.5}, {"text": ""}, {"text": "b"})
    chats = _lines({"messages": CHAT}, {"messages": CHAT[1:]}, SHAREGPT)
    texts = {".txt": text, ".txt.gz": gzip.compress(text), ".txt.zst": zstandard.compress(text)}
    texts |= {".jsonl": lines, ".jsonl.gz": gzip.compress(lines)}
    if importlib.util.find_spec("pyarrow") is not None:
        import pyarrow as pa
        from pyarrow import parquet

        file = io.BytesIO()
        parquet.write_table(pa.table({"text": [TEXT, "b"], "n": [1, 2]}), file)
        texts[".parquet"] = file.getvalue()

    def reader(suffix: str, content: bytes, **fields: Any) -> Reader:
        path = folder / f"text{suffix}"
        configs = [
            DataConfig(source=str(path), encoding_errors=errors, **fields)
            for errors in ("strict", "replace")
        ]

        def read() -> None:
            for config in configs:
                documents = [
                    "".join(piece.text for piece in document.pieces)
                    for document in open_corpus(config).documents()
                ]
                if suffix == ".txt":
                    text = path.read_bytes().decode("utf-8", config.encoding_errors)
                    assert documents == [text.removeprefix("\ufeff")], "another text"

        return of_file(suffix[1:], path, read, [content])

    return [
        *(reader(suffix, content) for suffix, content in texts.items()),
        reader(".chat.jsonl", chats, template="roles"),
        reader(".chats.jsonl", chats, template="roles", loss_mask="assistant"),
    ]


def _lines(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def byte_level_json(*special_tokens: str) -> str:
    """JSON of a byte-level BPE of 307 ids, trained on `TEXT`."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=307,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 5, trainer)
    return tokenizer.to_str()


def _tokenizer_readers(folder: Path) -> list[Reader]:
    model = models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]")  # noqa: S106
    words = tokenizers.Tokenizer(model)
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    libraries = [byte_level_json("<s>"), words.to_str()]
    saved = [
        json.dumps({"kind": "pretrained", "tokenizer": text, "special_ids": {"bos_id": 0}})
        for text in libraries
    ]
    saved += [json.dumps({"kind": "char", "alphabet": "ab c\n"}), BYTES.to_json()]
    path = folder / "tokenizer.json"

    def use(tokenizer: Any) -> None:
        for text in ("a b", TEXT):
            ids = tokenizer.encode(text)
            assert not ids.size or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size, "wrong ids"
            tokenizer.decode(ids)
        tokenizer.decode(range(-2, min(tokenizer.vocab_size + 2, 400)))

    def use_saved(content: bytes) -> None:
        tokenizer = tokenizer_from_json(as_text(content))
        tokenizer.decode(tokenizer.encode("a b"))
        try:
            use(tokenizer)
        except UserError:
            return  # the alphabet may lack characters of the text

    examples = [text.encode() for text in libraries]
    return [
        Reader("saved tokenizer", [text.encode() for text in saved], use_saved),
        of_file("tokenizer.json", path, lambda: use(load_tokenizer(str(path))), examples),
    ]


def as_text(content: bytes) -> str:
    """Decode an input that is given as text; lone surrogates stand for what is not UTF-8."""
    return content.decode("utf-8", "surrogateescape")
