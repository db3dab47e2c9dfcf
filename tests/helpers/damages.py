"""Damage to files, the same at every run."""

import json
import os
import random

import pytest

ODD_VALUES = (
    *(None, True, "", "x", "[UNK]", "\x1b[31m", "\ud83d", [], {}, [[[]]], 0, -1, 1, 3.5, 1e308),
    *(2**31, 2**32 - 1, 2**32, 2**63, 10**30),
)


def damaged_json(text, seed):
    """JSON text in which one value is another one or missing."""
    draw = random.Random(seed)
    values = json.loads(text)
    places = list(_places(values))
    # A vocabulary has more places than all else; half of the time it is left alone.
    if draw.random() < 0.5:
        places = [(holder, key) for holder, key in places if len(holder) < 100] or places
    holder, key = draw.choice(places)
    if draw.random() < 0.3:
        del holder[key]
    else:
        holder[key] = draw.choice(ODD_VALUES)
    return json.dumps(values)


def _places(values):
    if isinstance(values, dict | list):
        for key in values if isinstance(values, dict) else range(len(values)):
            yield values, key
            yield from _places(values[key])


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def make_writable(path):
    path.chmod(0o777)


def give_away(path):
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(path, 12345, 12345)
