"""Mutation of valid inputs: bits, bytes, and values of JSON and similar text."""

import random
import re

_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|\w+|[^\s\w]')
_VALUE = re.compile(rb'".*"|[-\d].*', re.DOTALL)
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
        content = draw.choice(_MUTATIONS)(content, draw)
    return content


def _flip_bits(content: bytes, draw: random.Random) -> bytes:
    flipped = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5)) if content else 0):
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(flipped)


def _truncate(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randint(0, len(content))]


def _leave_out(content: bytes, draw: random.Random) -> bytes:
    start = draw.randint(0, len(content))
    return content[:start] + content[start + draw.randint(1, 30) :]


def _insert(content: bytes, draw: random.Random) -> bytes:
    start = draw.randint(0, len(content))
    return content[:start] + draw.randbytes(draw.randint(1, 8)) + content[start:]


def _repeat(content: bytes, draw: random.Random) -> bytes:
    """Repeat a part twice, and rarely so often that the input is large."""
    start = draw.randint(0, len(content))
    part = content[start : start + draw.randint(1, 30)]
    times = _MANY // len(part) if part and draw.random() < 0.03 else 2
    return content[:start] + part * times + content[start + len(part) :]


def _change_value(content: bytes, draw: random.Random) -> bytes:
    """Change a number a little, or put a character into a text: the input often stays valid."""
    values = [token for token in _TOKEN.finditer(content) if _VALUE.fullmatch(token[0])]
    if not values:
        return content
    token = draw.choice(values)
    if token[0][:1] == b'"':
        at = draw.randint(1, len(token[0]) - 1)
        new = token[0][:at] + draw.choice(_CHARACTERS).encode() + token[0][at:]
    else:
        new = draw.choice((b"%d", b"%d.5", b"-%d", b"%de3")) % draw.choice((0, 1, 2, 7, 255, 256))
    return content[: token.start()] + new + content[token.end() :]


def _replace_token(content: bytes, draw: random.Random) -> bytes:
    """Put an odd value, or another token of the input, in the place of a word, number or sign."""
    tokens = list(_TOKEN.finditer(content))
    if not tokens:
        return draw.choice(ODD_TOKENS)
    # A value in the place of a value leaves JSON well-formed.
    values = [token for token in tokens if len(token[0]) > 1 or token[0].isdigit()]
    token = draw.choice(values if values and draw.random() < 0.8 else tokens)
    new = draw.choice(ODD_TOKENS) if draw.random() < 0.7 else draw.choice(tokens)[0]
    return content[: token.start()] + new + content[token.end() :]


_MUTATIONS = (
    *(_flip_bits, _truncate, _leave_out, _insert, _repeat),
    *(_replace_token, _replace_token, _replace_token),
    *(_change_value, _change_value, _change_value, _change_value),
)
