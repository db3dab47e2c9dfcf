"""``model.html``: weights, tokenizer and a forward pass in plain JavaScript, in one file."""

import base64
import importlib.resources
import json
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import numpy as np

from simplernn_jax.data.tokenizer import ids_without_text
from simplernn_jax.errors import UserError, counted
from simplernn_jax.export.chat_format import chat_format
from simplernn_jax.export.formats import (
    TrainedModel,
    check_architecture,
    check_packages,
    description,
    float16,
    int8_rows,
    is_rounded,
)
from simplernn_jax.export.html.tokenizer_data import tokenizer_data
from simplernn_jax.models.named_weights import named_weights

FILE = "model.html"
MAX_BYTES = 1 << 28
"""Weights beyond this make a page that browsers do not load."""


def write(trained: TrainedModel, folder: Path) -> None:
    """Write the page."""
    check_architecture("html", trained.model)
    check_packages("html", "py_mini_racer")
    weights = named_weights(trained.model)
    arrays, content = pack(weights, trained.quantize)
    if len(content) > MAX_BYTES:
        raise UserError(
            f"--format=html: the weights have {len(content):,} bytes, more than a browser loads "
            f"({MAX_BYTES:,}); use --quantize=int8, or another format"
        )
    tokenizer, config = trained.tokenizer, trained.model.config
    data = {
        "chat": chat_format(trained.config.data.template),
        "config": description(trained),
        "arrays": arrays,
        "tokenizer": tokenizer_data(tokenizer, config.vocab_size),
        "special": {
            "bos": tokenizer.bos_id,
            "eos": tokenizer.eos_id,
            "banned": sorted(ids_without_text(tokenizer, config.vocab_size)),
        },
    }
    shared = importlib.resources.files("simplernn_jax.serving") / "page"
    parameters = sum(weight.size for weight in weights.values())
    # Not escaped as a whole: most parts are styles, scripts and JSON.
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)  # noqa: S701
    page = environment.from_string(_source("index.html"))
    text = page.render(
        is_chat=data["chat"] is not None,
        title=markupsafe.escape(trained.name),
        facts=f"{counted(parameters, 'parameter')}, {counted(config.num_layers, 'layer')}",
        css=(shared / "page.css").read_text("utf-8"),
        model=jinja2.utils.htmlsafe_json_dumps(data),
        weights=base64.b64encode(content).decode(),
        model_js=_source("model.js"),
        tokens_js=(shared / "tokens.js").read_text("utf-8"),
        page_js=_source("page.js"),
    )
    (folder / FILE).write_text(text, "utf-8")


def _source(name: str) -> str:
    return (importlib.resources.files(__name__) / name).read_text("utf-8")


def pack(weights: dict[str, np.ndarray], kind: str) -> tuple[list[dict[str, Any]], bytes]:
    """Concatenate arrays, little-endian, each at a multiple of 4 bytes; describe each of them."""
    arrays: list[dict[str, Any]] = []
    content = bytearray()

    def add(values: np.ndarray) -> int:
        content.extend(b"\0" * (-len(content) % 4))
        offset = len(content)
        content.extend(values.astype(values.dtype.newbyteorder("<")).tobytes())
        return offset

    for name, weight in weights.items():
        type_ = kind if kind != "none" and is_rounded(weight) else "float32"
        array: dict[str, Any] = {"name": name, "size": weight.size, "type": type_}
        if type_ == "int8":
            integers, scale = int8_rows(weight)
            array |= {"offset": add(integers), "scale_offset": add(scale), "rows": len(scale)}
        elif type_ == "float16":
            array["offset"] = add(float16(weight))
        else:
            array["offset"] = add(weight.astype(np.float32))
        arrays.append(array)
    return arrays, bytes(content)


class _Loaded:
    """The scripts of the page in V8, without a page."""

    def __init__(self, folder: Path) -> None:
        import py_mini_racer

        page = (folder / FILE).read_text("utf-8")
        self._context = py_mini_racer.MiniRacer()
        parts = {name: _part(page, name) for name in ("model", "weights", "forward-pass")}
        self._context.eval(parts["forward-pass"])
        self._context.eval(f"const data = {parts['model']};")
        self._context.eval(f"const bytes = fromBase64({json.dumps(parts['weights'])});")
        self._context.eval(
            """
            const model = new LanguageModel(data.config, decodeWeights(data.arrays, bytes));
            const tokenizer = new Tokenizer(data.tokenizer);
            function logitsOf(tokens) {
              const state = model.initialState();
              return tokens.map((token) => Array.from(model.step(state, token)));
            }
            function greedy(token, count) {
              const state = model.initialState(), tokens = [];
              for (let i = 0; i < count; i++) {
                token = argmax(model.step(state, token));
                tokens.push(token);
              }
              return tokens;
            }"""
        )

    def _call(self, expression: str) -> Any:
        return json.loads(str(self._context.eval(f"JSON.stringify({expression})")))

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return np.array(self._call(f"logitsOf({tokens.tolist()})"))

    def greedy(self, token: int, count: int) -> list[int]:
        return self._call(f"greedy({token}, {count})")

    def encode(self, text: str) -> list[int]:
        return self._call(f"tokenizer.encode({json.dumps(text)})")


def _part(page: str, name: str) -> str:
    start = page.index(">", page.index(f'id="{name}"')) + 1
    return page[start : page.index("</script>", start)]


load = _Loaded
