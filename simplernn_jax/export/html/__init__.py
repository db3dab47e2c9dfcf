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
from simplernn_jax.export.formats import (
    TrainedModel,
    chat_format,
    check_architecture,
    check_packages,
    description,
    float16,
    int8_rows,
    is_rounded,
)
from simplernn_jax.export.html.tokenizer_data import tokenizer_data
from simplernn_jax.models.pytorch_weights import named_weights

FILE = "model.html"
MAX_BYTES = 350_000_000
"""Browsers do not load a larger page."""


def write(trained: TrainedModel, folder: Path) -> None:
    """Write the page."""
    check_architecture("html", trained.model)
    check_packages("html", "py_mini_racer")
    weights = named_weights(trained.model)
    tokenizer, config = trained.tokenizer, trained.model.config
    data = {
        "chat": chat_format(trained.config.data.template),
        "config": description(trained),
        "weights": encode(weights, trained.quantize),
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
    text = environment.from_string(_source("index.html")).render(
        is_chat=data["chat"] is not None,
        title=markupsafe.escape(trained.name),
        facts=f"{counted(parameters, 'parameter')}, {counted(config.num_layers, 'layer')}",
        css=(shared / "page.css").read_text("utf-8"),
        model=jinja2.utils.htmlsafe_json_dumps(data),
        model_js=_source("model.js"),
        tokens_js=(shared / "tokens.js").read_text("utf-8"),
        page_js=_source("page.js"),
    )
    if len(text) > MAX_BYTES:
        raise UserError(
            f"--format=html: the page has {len(text):,} bytes, more than a browser loads "
            f"({MAX_BYTES:,}); use --quantize=int8, or another format"
        )
    (folder / FILE).write_text(text, "utf-8")


def _source(name: str) -> str:
    return (importlib.resources.files(__name__) / name).read_text("utf-8")


def encode(weights: dict[str, np.ndarray], kind: str) -> dict[str, dict[str, str]]:
    """Encode each array: its type, its little-endian values in base64, and the scales of int8."""

    def base64_of(values: np.ndarray) -> str:
        values = values.astype(values.dtype.newbyteorder("<"))
        return base64.b64encode(values.tobytes()).decode()

    encoded = {}
    for name, weight in weights.items():
        if kind == "none" or not is_rounded(weight):
            encoded[name] = {"type": "float32", "values": base64_of(weight)}
        elif kind == "float16":
            encoded[name] = {"type": "float16", "values": base64_of(float16(weight))}
        else:
            integers, scales = map(base64_of, int8_rows(weight))
            encoded[name] = {"type": "int8", "values": integers, "scales": scales}
    return encoded


class _Loaded:
    """The scripts of the page in V8, without a page."""

    def __init__(self, folder: Path) -> None:
        import py_mini_racer

        page = (folder / FILE).read_text("utf-8")
        self._context = py_mini_racer.MiniRacer()
        self._context.eval(_part(page, "forward-pass"))
        self._context.eval(f"const data = JSON.parse({json.dumps(_part(page, 'model'))});")
        self._context.eval(
            """
            const model = new LanguageModel(data.config, decodeWeights(data.weights));
            const tokenizer = new Tokenizer(data.tokenizer);
            function logitsOf(tokens) {
              const state = model.initialState();
              return tokens.map((token) => Array.from(model.step(state, token)));
            }"""
        )

    def _call(self, expression: str) -> Any:
        return json.loads(str(self._context.eval(f"JSON.stringify({expression})")))

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return np.array(self._call(f"logitsOf({tokens.tolist()})"))

    def encode(self, text: str) -> list[int]:
        return self._call(f"tokenizer.encode({json.dumps(text)})")


def _part(page: str, name: str) -> str:
    start = page.index(">", page.index(f'id="{name}"')) + 1
    return page[start : page.index("</script>", start)]


load = _Loaded
