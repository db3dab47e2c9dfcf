"""Mutated inputs of everything that reads a file which somebody else may have made."""

import contextlib
import dataclasses
import gzip
import io
import json
import random
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import safetensors.numpy
import tokenizers
import zstandard
from flax import nnx
from pyarrow import parquet
from tokenizers import decoders, models, pre_tokenizers

from simplernn_jax import load_model
from simplernn_jax.config import DataConfig, from_json
from simplernn_jax.data.chat_template import ChatTemplate, TemplateError, load_template
from simplernn_jax.data.corpora import open_corpus
from simplernn_jax.data.tokenizer import load_tokenizer, tokenizer_from_json
from simplernn_jax.errors import UserError
from simplernn_jax.inference import generate, load_state, save_state
from simplernn_jax.models import LanguageModel
from simplernn_jax.models.fla_checkpoint import load_fla_checkpoint, to_fla_config
from simplernn_jax.models.pytorch_weights import named_weights, read_pytorch_weights
from simplernn_jax.training.metrics import FILE_NAME, read_metrics

from . import Case, run_cases
from .runs import quiet, run_quietly, small_config

TEXT = "The naïve café — sells 13 кофе and 茶.\n\tIt <s> closes </s> at five 🙂!\r\n"
CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo\n"},
]
SHAREGPT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}
ALPACA = {"instruction": "add", "input": "1 2", "output": "3"}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_SECONDS = 5.0
"""CPU time of an input."""


class Reader(NamedTuple):
    """Something that reads input."""

    name: str
    examples: Sequence[bytes]
    """Valid inputs."""
    read: Callable[[bytes], object]
    """Use the input; anything but a rejection is a defect, wrong results included."""


def fuzz(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Any input to a reader of files is accepted, or rejected with a reason, in time."""
    with quiet():
        readers = [*_text_readers(folder), *_tokenizer_readers(folder), *_run_readers(folder)]
        for reader in readers:
            for example in reader.examples:
                reader.read(example)  # or every input would be rejected

    def run_case(number: int, draw: random.Random) -> Case:
        reader = readers[number % len(readers)]
        content = mutated(draw.choice(reader.examples), draw)
        kind, problem = "accepted", None
        started = time.process_time()
        try:
            with quiet():
                reader.read(content)
        except (UserError, TemplateError) as error:
            kind, problem = "rejected", None if str(error).strip() else "rejected without a reason"
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # such as a panic of a library in Rust
            place = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"{error!r:.300} at {place.filename}:{place.lineno}"
        seconds = time.process_time() - started
        if seconds > MAX_SECONDS and problem is None:
            problem = f"took {seconds:.1f} s"
        return Case(f"{number}: {reader.name}, {content[:10_000]!r}", problem, kind)

    return run_cases(run_case, count, seed)


def _of_file(
    name: str, path: Path, read: Callable[[], object], examples: Sequence[bytes] = ()
) -> Reader:
    """A reader of a file, whose present content is the example by default."""

    def write_and_read(content: bytes) -> None:
        path.write_bytes(content)
        read()

    return Reader(name, examples or [path.read_bytes()], write_and_read)


def _text_readers(folder: Path) -> Iterator[Reader]:
    """Readers of each format of text and conversations."""
    text, lines = TEXT.encode(), _lines({"text": TEXT, "n": 1.5}, {"text": ""}, {"text": "b"})
    table = io.BytesIO()
    parquet.write_table(pa.table({"text": [TEXT, "b"], "n": [1, 2]}), table)
    chats = _lines({"messages": CHAT}, {"messages": CHAT[1:]}, SHAREGPT, ALPACA)
    texts = {".txt": text, ".txt.gz": gzip.compress(text), ".txt.zst": zstandard.compress(text)}
    texts |= {".jsonl": lines, ".jsonl.gz": gzip.compress(lines), ".parquet": table.getvalue()}
    texts |= {".csv": f'n,text\n1,"{TEXT}"\n2,b\n'.encode(), ".chat.jsonl": chats}

    def read(path: Path) -> None:
        for errors in ("strict", "replace"):
            config = DataConfig(source=str(path), encoding_errors=errors)
            if ".chat" in path.name:
                config = dataclasses.replace(config, template="roles", loss_mask="assistant")
            found = "".join(piece.text for _, piece in open_corpus(config).pieces())
            if path.suffix == ".txt":
                text = path.read_bytes().decode("utf-8", errors)
                assert found == text.removeprefix("\ufeff"), "another text"

    for suffix, content in texts.items():
        path = folder / f"text{suffix}"
        yield _of_file(suffix, path, lambda path=path: read(path), [content])  # type: ignore[misc]


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
    )
    tokenizer.train_from_iterator([TEXT] * 5, trainer)
    return tokenizer.to_str()


def _tokenizer_readers(folder: Path) -> Iterator[Reader]:
    """Readers of tokenizers and of chat templates."""
    library, path = byte_level_json("<s>"), folder / "tokenizer.json"
    saved = {"kind": "pretrained", "tokenizer": library, "special_ids": {"bos_id": 0}}
    kinds = [saved, {"kind": "char", "alphabet": "ab c\n"}]

    def use(tokenizer: Any) -> None:
        for text in ("a b", TEXT):
            ids = tokenizer.encode(text)
            assert not ids.size or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size, "wrong ids"
            tokenizer.decode(ids)
        tokenizer.decode(range(-2, min(tokenizer.vocab_size + 2, 400)))

    def use_saved(content: bytes) -> None:
        tokenizer = tokenizer_from_json(_as_text(content))
        with contextlib.suppress(UserError):  # the alphabet may lack characters of the text
            use(tokenizer)

    def render(content: bytes) -> None:
        template = ChatTemplate(load_template(_as_text(content)))
        template.render(CHAT, add_generation_prompt=True)
        list(template.pieces([CHAT], only_assistant=True))

    yield _of_file(path.name, path, lambda: use(load_tokenizer(str(path))), [library.encode()])
    yield Reader("saved tokenizer", [json.dumps(kind).encode() for kind in kinds], use_saved)
    yield Reader("chat template", [CHATML.encode(), load_template("roles").encode()], render)


def _run_readers(folder: Path) -> Iterator[Reader]:
    """Readers of what runs and exports write."""
    run, path, fla = folder / "run", folder / "state.safetensors", folder / "fla"
    run_quietly(small_config(folder, steps=3, save_every=3, eval_every=3), run)
    model, tokenizer, config = load_model(str(run))
    state = generate(model, [[1, 2, 3]], max_new_tokens=2).state
    save_state(str(path), state, model, tokenizer)
    weights = folder / "weights.safetensors"
    safetensors.numpy.save_file(named_weights(model), weights)
    gla = dataclasses.replace(config.model, block="swiglu", mixer="gla")
    fla.mkdir()
    named = named_weights(LanguageModel(gla, rngs=nnx.Rngs(0)))
    safetensors.numpy.save_file(named, fla / "model.safetensors")
    (fla / "config.json").write_text(json.dumps(to_fla_config(gla)))

    def read_state() -> None:
        found = load_state(str(path), model, tokenizer)
        jax.tree.map(np.testing.assert_array_equal, found, state)

    configuration = (run / "config.json").read_bytes()
    yield Reader("configuration", [configuration], lambda x: from_json(_as_text(x)))
    yield _of_file("metrics", run / FILE_NAME, lambda: read_metrics(str(run)))
    yield _of_file("state", path, read_state)
    yield _of_file("weights", weights, lambda: read_pytorch_weights(str(weights)))
    yield _of_file("settings of fla", fla / "config.json", lambda: load_fla_checkpoint(str(fla)))


def _as_text(content: bytes) -> str:
    """Decode an input that is given as text; lone surrogates stand for what is not UTF-8."""
    return content.decode("utf-8", "surrogateescape")


_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|\w+|[^\s\w]')
_CHARACTERS = (*"a é🙂\x7f\u2028\ufeff{%", r"\n", r"\u0001", r"\u0000")
_ODD_NUMBERS = (0, -1, 1, 3.5, 1e308, 2**31, 2**32 - 1, 2**32, 2**63, 10**30)
_ODD_TEXTS = (b"", b"x", b"\\ud83d", b"\\u0000", b"\x1b[31m", b"\xff", b"\\n", b"a" * 9999)
ODD_TOKENS = (
    *(repr(number).encode() for number in _ODD_NUMBERS),
    *(b'"' + text + b'"' for text in _ODD_TEXTS),
    b"null",
    b"true",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"[]",
    b"{}",
    b"[[[]]]",
    b"\0",
    b"9" * 5000,
    b"[" * 3000,
    b'{"a":' * 3000,
)
"""Values of other types, out of every range, or expensive to parse."""
_MANY = 100_000
"""Bytes of an input that is made large."""


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Change `content` in one to three ways."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        mutate = draw.choice((_change_bytes, _change_token, _change_token))
        content = mutate(content, draw)
    return content


def _change_bytes(content: bytes, draw: random.Random) -> bytes:
    """Flip a bit; leave out, insert or repeat a part, rarely so often that the input is large."""
    start = draw.randint(0, len(content))
    part = content[start : start + draw.choice((1, draw.randint(1, 30), len(content)))]
    flipped = bytes([part[0] ^ 1 << draw.randrange(8)]) + part[1:] if part else b""
    times = _MANY // len(part) if part and draw.random() < 0.03 else 2
    inserted = draw.randbytes(draw.randint(1, 8)) + part
    new = draw.choice((flipped, flipped, b"", inserted, part * times))
    return content[:start] + new + content[start + len(part) :]


def _change_token(content: bytes, draw: random.Random) -> bytes:
    """Change a word, number or sign, often a little, so that the input stays valid."""
    tokens = list(_TOKEN.finditer(content))
    if not tokens:
        return draw.choice(ODD_TOKENS)
    # A value in the place of a value leaves JSON well-formed.
    values = [token for token in tokens if len(token[0]) > 1 or token[0].isdigit()]
    token = draw.choice(values if values and draw.random() < 0.8 else tokens)
    old, kind = token[0], draw.random()
    if kind < 0.4:
        new = draw.choice(ODD_TOKENS)
    elif kind < 0.5:
        new = draw.choice(tokens)[0]
    elif old[:1] == b'"':
        at = draw.randint(1, max(1, len(old) - 1))
        new = old[:at] + draw.choice(_CHARACTERS).encode() + old[at:]
    else:
        new = draw.choice((b"%d", b"%d.5", b"-%d", b"%de3")) % draw.choice((0, 1, 2, 7, 255, 256))
    return content[: token.start()] + new + content[token.end() :]
