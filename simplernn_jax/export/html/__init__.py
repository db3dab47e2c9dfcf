"""``model.html``: weights, tokenizer and a forward pass in plain JavaScript, in one file."""

import base64
import importlib.resources
import json
import re
import string
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import numpy as np

from simplernn_jax.data.pretrained_tokenizer import GPT2_PATTERN, byte_level_alphabet
from simplernn_jax.data.tokenizer import Tokenizer, ids_without_text
from simplernn_jax.errors import UserError, counted
from simplernn_jax.export.formats import (
    TrainedModel,
    chat_format,
    check_architecture,
    check_packages,
    description,
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
        values, *scales = stored_weight(weight, kind)
        encoded[name] = {"type": values.dtype.name, "values": base64_of(values)}
        if scales:
            encoded[name]["scales"] = base64_of(scales[0])
    return encoded


def tokenizer_data(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Describe a tokenizer for the page: its kind, the bytes of all ids, for BPE merges and words.

    Bytes are text of as many characters.

    Raises:
      UserError: a pretrained tokenizer is not byte-level BPE of the known kinds.
    """
    saved = json.loads(tokenizer.to_json())
    data: dict[str, Any] = {
        "kind": saved["kind"],
        "bytes": [tokenizer.decode_bytes([id_]).decode("latin-1") for id_ in range(vocab_size)],
    }
    if saved["kind"] == "pretrained":
        data |= _bpe(json.loads(saved["tokenizer"])) | {"kind": "bpe"}
    return data


def _bpe(content: dict[str, Any]) -> dict[str, Any]:
    model, normalizer = content["model"], content.get("normalizer") or {}
    plain = [token["content"] for token in content.get("added_tokens", []) if not token["special"]]
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    for reason, found in (
        ("model is", [] if model.get("type") == "BPE" else [model.get("type")]),
        ("normalizer is", [normalizer["type"]] if normalizer else []),
        ("model has", [name for name in odd if model.get(name)]),
        ("added token is", plain),
    ):
        if found:
            raise _not_supported(f"its {reason} {found[0]}")
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    byte_of = byte_level_alphabet()

    def encoded(token: str) -> str:
        if not all(character in byte_of for character in token):
            raise _not_supported("it is not byte-level")
        return "".join(chr(byte_of[character]) for character in token)

    return {
        "merges": [[encoded(part) for part in merge] for merge in merges],
        "pattern": _pattern(content.get("pre_tokenizer")),
        "whole_words": bool(model.get("ignore_merges")),
    }


def _pattern(pre_tokenizer: Any) -> str:
    """Return the words of a pre-tokenizer as a pattern of JavaScript."""
    parts = [pre_tokenizer]
    if isinstance(pre_tokenizer, dict) and pre_tokenizer.get("type") == "Sequence":
        parts = pre_tokenizer["pretokenizers"]
    *splits, last = parts
    if not isinstance(last, dict) or last.get("type") != "ByteLevel":
        raise _not_supported("it is not byte-level")
    if last.get("add_prefix_space"):
        raise _not_supported("it adds a space before a text")
    patterns = [GPT2_PATTERN] if last.get("use_regex", True) else []
    for split in splits:
        is_known = split.get("type") == "Split" and split.get("behavior") == "Isolated"
        if not is_known or split.get("invert") or "Regex" not in split["pattern"]:
            raise _not_supported(f"its pre-tokenizer has a part {split.get('type')}")
        patterns.append(split["pattern"]["Regex"])
    if len(patterns) > 1:
        raise _not_supported("its pre-tokenizer splits twice")
    pattern = _without_modifiers(patterns[0] if patterns else "")
    # JavaScript's own classes differ in two characters.
    return pattern.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")


def _without_modifiers(pattern: str) -> str:
    """Replace ``(?i:...)`` around plain text, which older browsers reject, by classes."""

    def both_cases(match: re.Match[str]) -> str:
        text = match[1]
        return "(?:" + "".join(_CASES.get(c.lower(), c) for c in text) + ")"

    return re.sub(r"\(\?i:([^()\[\]\\{}]*)\)", both_cases, pattern)


def _not_supported(reason: str) -> UserError:
    return UserError(
        f"--format=html: the tokenizer is not supported by this format ({reason}); use another "
        "format"
    )


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
