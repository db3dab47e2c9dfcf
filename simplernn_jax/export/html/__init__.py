"""``model.html``: weights, tokenizer and a forward pass in plain JavaScript, in one file."""

import base64
import importlib.resources
import json
import re
import string
from pathlib import Path
from typing import Any

import numpy as np

from simplernn_jax.data.pretrained_tokenizer import GPT2_PATTERN
from simplernn_jax.data.tokenizer import CharTokenizer, Tokenizer, ids_without_text
from simplernn_jax.errors import UserError, counted
from simplernn_jax.export.formats import (
    TrainedModel,
    chat_format,
    check_architecture,
    check_packages,
    description,
    library_tokenizer,
    stored_weight,
)
from simplernn_jax.models.pytorch_weights import named_weights

FILE = "model.html"
MAX_BYTES = 350_000_000
"""Browsers do not load a larger page."""

_CASES = {c: f"[{c}{c.upper()}]" for c in string.ascii_lowercase}
_CASES |= {"s": "[sS\u017f]", "k": "[kK\u212a]"}  # the two with a third form in Unicode


def write(trained: TrainedModel, folder: Path) -> None:
    """Write the page."""
    check_architecture("html", trained.model)
    check_packages("html", "py_mini_racer")
    weights = named_weights(trained.model)
    tokenizer, config = trained.tokenizer, trained.model.config
    parameters = sum(weight.size for weight in weights.values())
    data = {
        "name": trained.name,
        "facts": f"{counted(parameters, 'parameter')}, {counted(config.num_layers, 'layer')}",
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
    text = _page(json.dumps(data).replace("<", "\\u003c"))
    if len(text) > MAX_BYTES:
        raise UserError(
            f"--format=html: the page has {len(text):,} bytes, more than a browser loads "
            f"({MAX_BYTES:,}); use --quantize=int8, or another format"
        )
    (folder / FILE).write_text(text, "utf-8")


def _page(model: str) -> str:
    """Return the page of the server in one file, with a model in place of the server."""
    page = importlib.resources.files("simplernn_jax.serving") / "page"
    html, css, page_js = (
        (page / name).read_text("utf-8") for name in ("index.html", "page.css", "page.js")
    )
    here = importlib.resources.files(__name__)
    model_js, source_js = ((here / name).read_text("utf-8") for name in ("model.js", "source.js"))
    html = html.replace('<link rel="stylesheet" href="page.css">', f"<style>\n{css}</style>")
    html = html.replace('<script src="page.js"></script>', f"<script>\n{page_js}</script>")
    return html.replace(
        '<script src="server.js"></script>',
        f'<script type="application/json" id="model">{model}</script>\n'
        f'<script id="forward-pass">\n{model_js}</script>\n<script>\n{source_js}</script>',
    )


def encode(weights: dict[str, np.ndarray], kind: str) -> dict[str, dict[str, Any]]:
    """Encode each array: its type, and in base64 its values and the scales of int8."""
    encoded = {}
    for name, weight in weights.items():
        arrays = stored_weight(weight, kind)
        parts = [base64.b64encode(array.tobytes()).decode() for array in arrays]
        encoded[name] = {"type": arrays[0].dtype.name, "arrays": parts}
    return encoded


def tokenizer_data(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Describe a tokenizer as byte-level BPE: the bytes of all ids, merges, and what a word is.

    The bytes of an id are text of as many characters. Characters as tokens are words without
    merges.

    Raises:
      UserError: a pretrained tokenizer is of another kind.
    """
    bytes_of = [tokenizer.decode_bytes([id_]).decode("latin-1") for id_ in range(vocab_size)]
    if isinstance(tokenizer, CharTokenizer):
        return {"bytes": bytes_of, "merges": [], "pattern": "[^]", "whole_words": True}
    content = json.loads(library_tokenizer(tokenizer).to_str())
    model, pattern = content["model"], _pattern(content["pre_tokenizer"])
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if (
        model["type"] != "BPE"
        or any(model[name] for name in odd)
        or content["normalizer"]
        or pattern is None
        or not all(token["special"] for token in content["added_tokens"])
    ):
        raise UserError(
            "--format=html: the tokenizer is not supported by this format; use another format, or "
            "byte-level BPE without a normalizer, added words, prefix spaces or a second split"
        )
    return {
        "bytes": bytes_of,
        "merges": [[model["vocab"][token] for token in merge] for merge in model["merges"]],
        "pattern": pattern,
        "whole_words": model["ignore_merges"],
    }


def _pattern(pre_tokenizer: Any) -> str | None:
    """Return the words of a pre-tokenizer as a pattern of JavaScript; None for an unknown kind."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": has_pattern}:
            pattern = GPT2_PATTERN if has_pattern else ""
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "behavior": "Isolated",
                    "invert": False,
                    "pattern": {"Regex": split},
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            pattern = split
        case _:
            return None
    # JavaScript's own classes differ in two characters.
    pattern = pattern.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")
    return _without_modifiers(pattern)


def _without_modifiers(pattern: str) -> str:
    """Replace ``(?i:...)`` around plain text, which older browsers reject, by classes."""

    def both_cases(match: re.Match[str]) -> str:
        text = match[1]
        return "(?:" + "".join(_CASES.get(c.lower(), c) for c in text) + ")"

    return re.sub(r"\(\?i:([^()\[\]\\{}]*)\)", both_cases, pattern)


class _Loaded:
    """The scripts of the page in V8, without a page."""

    def __init__(self, folder: Path) -> None:
        import py_mini_racer

        scripts = re.compile(r'<script[^>]* id="[^"]*">(.*?)</script>', re.DOTALL)
        model, forward_pass = scripts.findall((folder / FILE).read_text("utf-8"))
        self._context = py_mini_racer.MiniRacer()
        self._context.eval(forward_pass)
        self._context.eval(f"const data = JSON.parse({json.dumps(model)});")
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


load = _Loaded
