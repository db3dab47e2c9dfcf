"""Mutation of valid inputs: bits, bytes, and values of JSON and similar text."""

import random
import re

_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|\w+|[^\s\w]')
_CHARACTERS = (*"a é🙂\x7f\u2028\ufeff{%", r"\n", r"\u0001", r"\u0000")
_ODD_NUMBERS = (0, -1, 1, 3.5, 1e308, 2**31, 2**32 - 1, 2**32, 2**63, 10**30)
_ODD_TEXTS = (b"", b"x", b"\\ud83d", b"\\u0000", b"\x1b[31m", b"\xff", b"\\n", b"a" * 9999)
ODD_TOKENS = (
    *(repr(number).encode() for number in _ODD_NUMBERS),
    *(b'"' + text + b'"' for text in _ODD_TEXTS),
    *(b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"[]", b"{}", b"[[[]]]", b"\0"),
    *(b"9" * 5000, b"[" * 3000, b'{"a":' * 3000),
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
