"""Tokenizers for the JavaScript of a page: bytes, characters, or byte-level BPE."""

import json
import re
import string
from typing import Any

from simplernn_jax.data.pretrained_tokenizer import GPT2_PATTERN, byte_level_alphabet
from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.errors import UserError

_CASES = {c: f"[{c}{c.upper()}]" for c in string.ascii_lowercase}
_CASES |= {"s": "[sS\u017f]", "k": "[kK\u212a]"}  # the two with a third form in Unicode


def tokenizer_data(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Describe a tokenizer: its kind, the bytes of all ids, and for BPE merges and words.

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
