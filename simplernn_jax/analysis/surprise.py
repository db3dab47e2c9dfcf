"""How surprising each line, word or token of a text is to a model.

A text is one document that comes block by block: memory does not grow with it, since the state is
carried from its first character to its last. The bits of a token are its negative log2 probability
given everything before it. A line is ranked by its most surprising token: by the bits of this token
beyond those that the model expected, so that random digits, which the model knows to be random,
count little.
"""

import dataclasses
import functools
import itertools
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from simplernn_jax.data.tokenizer import Tokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.files import page_template
from simplernn_jax.inference.arguments import check_logits
from simplernn_jax.inference.decode import CHUNK_LENGTHS, generate
from simplernn_jax.inference.engine import Engine, PrefixState, Programs
from simplernn_jax.inference.state import empty_state
from simplernn_jax.models import LanguageModel

LEVELS = (1, 2, 4, 6, 9, 13)
"""Bits more than expected, from which each color of the page is used."""
_ROWS = 64
"""Rows of logits that are in memory at a time."""
_EXPECTED_TOKENS = 40
_KINDS = 1 << 16
"""Number of running averages, into which kinds of lines are hashed."""
_RECENT = 10_000

_DATE = rb"\b\d{4}[-/]\d\d[-/]\d\d"
_CLOCK = rb"\d{1,2}:\d\d(?::\d\d(?:[.,]\d+)?)?(?:Z|[+-]\d\d:?\d\d)?"
_MASKS = {
    "uuid": rb"\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b",
    "time": _DATE + rb"[T ]+" + _CLOCK + rb"|\b(?:[A-Z]\w\w [ \d]\d )?" + _CLOCK + rb"|" + _DATE,
    "hex": rb"\b0x[0-9a-fA-F]+\b|\b(?=[a-fA-F]*\d)[0-9a-fA-F]{6,}\b",
    "digits": rb"\d+",
}
"""Patterns of fields that vary; one that may be a part of another comes after it."""
_UNITS = {"line": rb".*\n?", "word": rb"[^\S\n]*(?:\S+|\n?)"}


class Place(NamedTuple):
    """A place in a scored text: tokens, fewer than a chunk, after a state."""

    state: PrefixState
    ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class ScoredBlock:
    """Consecutive text and its n tokens."""

    text: bytes  # UTF-8
    ids: np.ndarray  # [n] int32
    starts: np.ndarray  # [n] int64 position in `text` of the first byte of each token
    bits: np.ndarray  # [n] float32
    excess: np.ndarray  # [n] float32 bits beyond those that the model expected, at least 0
    chunks: list[tuple[int, PrefixState]]  # first tokens of chunks, and the states before them

    def token_of_bytes(self) -> np.ndarray:
        """Return the index of the token of each byte."""
        return np.repeat(np.arange(len(self.ids)), np.diff(self.starts, append=len(self.text)))

    def before(self, index: int) -> Place:
        """Return the place before token `index`."""
        first, state = next(chunk for chunk in reversed(self.chunks) if chunk[0] <= index)
        return Place(state, self.ids[first:index])


def score(
    model: LanguageModel, tokenizer: Tokenizer, texts: Iterable[str]
) -> Iterator[ScoredBlock]:
    """Score the consecutive texts of one document; each is a block.

    Raises:
      UserError: parameters of 16 bits, the tokenizer cannot encode a text, its tokens are not
        pieces of the text, or the model's logits are not finite.
    """
    engine = Engine(model)
    num_bytes = functools.cache(lambda token: len(tokenizer.decode_bytes([token])))
    empty, bos = empty_state(model, 1), np.array([tokenizer.bos_id], np.int32)
    state = PrefixState(empty.layers, empty.logits)
    (((state, _),), _) = engine.prefill([state], [bos], engine.chunk_length(1, CHUNK_LENGTHS))
    for text in texts:
        ids, data = tokenizer.encode(text), text.encode()
        lengths = np.array([*map(num_bytes, ids.tolist())], np.int64)
        if lengths.sum() != len(data):
            raise UserError(
                "the tokens of this model are not pieces of its text, so that none has bits of its "
                "own; use a model of bytes, characters or a byte-level tokenizer"
            )
        scores: list[np.ndarray | jax.Array] = [np.zeros((2, 0), np.float32)]
        chunks, position = [], 0
        while position < len(ids):
            chunks.append((position, state))
            left, logits = ids[position:], state.logits
            length = engine.chunk_length(len(left), CHUNK_LENGTHS)
            (((state, hidden),), (count,)) = engine.prefill([state], [left], length)
            jax.block_until_ready(hidden)  # two programs at a time would slow each other
            targets = np.resize(left[:count], length)
            scores.append(_score(engine.programs, engine.parameters, logits, hidden, targets))
            position += int(count)
        check_logits(state.logits)
        # Only the last chunk may have fewer tokens than its length.
        bits, excess = np.concatenate(jax.device_get(scores), axis=1)[:, : len(ids)]
        yield ScoredBlock(data, ids, np.cumsum(lengths) - lengths, bits, excess, chunks)


@functools.partial(jax.jit, static_argnums=0)
def _score(
    programs: Programs,
    parameters: list[Array],
    logits: Float[Array, "1 vocab"],
    hidden: Float[Array, "1 T D"],
    targets: Int[Array, "T"],
) -> Float[Array, "2 T"]:
    """Compute the bits and the excess of a chunk, from the logits before it."""
    model = programs.merge(parameters)

    def score_one(row: tuple[jax.Array, ...]) -> Float[Array, "2"]:
        is_first, inputs, target = row
        new = jnp.where(is_first, logits[0], model.logits(inputs[None, None])[0, 0])
        shifted = new - jnp.max(new)
        weights = jnp.exp(shifted)
        total = jnp.sum(weights)
        excess = jnp.sum(weights * shifted) / total - shifted[target]
        return jnp.stack([jnp.log(total) - shifted[target], jnp.maximum(excess, 0)]) / math.log(2)

    # The head at a token predicts the next one.
    rows = jnp.arange(len(targets)) == 0, jnp.roll(hidden[0], 1, axis=0), targets
    return lax.map(score_one, rows, batch_size=_ROWS).T


def expected_text(model: LanguageModel, tokenizer: Tokenizer, place: Place) -> str:
    """Generate greedily from a place in a scored text to the end of a word or line.

    The text has at most 40 tokens.
    """
    generation = generate(
        model,
        [place.ids],
        max_new_tokens=_EXPECTED_TOKENS,
        eos_id=tokenizer.eos_id,
        state=dataclasses.replace(empty_state(model, 1), **place.state._asdict()),
    )
    text = tokenizer.decode_bytes(generation.sequences()[0]).decode("utf-8", "ignore")
    return re.findall(r"\s*\S*", text)[0]


class Unit(NamedTuple):
    """A line, a word with the space before it, or a token of a text."""

    line: int  # from 1
    column: int  # in bytes, from 1
    text: str  # without the end of the line
    bits: float
    surprise: float  # what units are ranked by
    at: int  # characters of `text` before the most surprising one
    place: Place  # the text before that character


def cut_units(
    blocks: Iterable[ScoredBlock], by: str, masks: Sequence[str] = (), relative: bool = False
) -> Iterator[Unit]:
    """Cut the blocks of one text into units, except blank ones.

    Args:
      blocks: from `score`.
      by: ``line``, ``word`` or ``token``.
      masks: fields whose bits do not count: ``digits``, ``hex``, ``time``, ``uuid``.
      relative: subtract the average surprise of the earlier units of the same kind, which are those
        that differ in their words and numbers only. The average of all counts as one more of them.
    """
    patterns = [pattern for name, pattern in _MASKS.items() if name in masks]
    mask = re.compile(b"|".join(patterns) or rb"(?!)")
    averages = np.zeros((_KINDS + 1, 2))
    line = column = 1
    for block in blocks:
        text, starts, token_of = block.text, block.starts.tolist(), block.token_of_bytes()
        is_counted = np.ones(len(starts), np.bool_)
        for match in mask.finditer(text):
            is_counted[token_of[match.start() : match.end()]] = False
        # At the first byte of each token, or at the first of the line that begins within it.
        places, is_end = block.starts.copy(), np.frombuffer(text, np.uint8) == ord("\n")
        begins = 1 + np.flatnonzero(is_end[:-1] & ~is_end[1:] & (np.diff(token_of) == 0))
        places[token_of[begins]] = begins
        bits, excess = np.zeros((2, len(text)))
        bits[places], excess[places] = block.bits * is_counted, block.excess * is_counted
        spans: Iterable[tuple[int, int]] = itertools.pairwise([*starts, len(text)])
        if by != "token":
            spans = (match.span() for match in re.finditer(_UNITS[by], text))
        for start, end in spans:
            whole = text[start:end]
            if whole.strip():
                peak = start + int(np.argmax(excess[start:end]))
                surprise = float(excess[peak])
                if relative:
                    surprise -= _expect(averages, whole, surprise)
                while peak > start and text[peak] & 0xC0 == 0x80:  # inside a character
                    peak -= 1
                yield Unit(
                    line,
                    column,
                    whole.rstrip(b"\r\n").decode("utf-8", "replace"),
                    float(bits[start:end].sum()),
                    surprise,
                    len(text[start:peak].decode()),
                    block.before(token_of[peak]),
                )
            if newlines := whole.count(b"\n"):  # a token may have several, and what follows them
                line, column = line + newlines, len(whole) - whole.rfind(b"\n")
            else:
                column += len(whole)


def _expect(averages: np.ndarray, text: bytes, surprise: float) -> float:
    """Return the average surprise of the kind of a unit so far, and add this unit to it.

    `averages` has the counts and sums of kinds, and of all units in the last row.
    """
    # The lookbehind only saves time, in long runs of letters.
    numbers = re.sub(rb"(?<![0-9a-fA-F])[0-9a-fA-F]*\d\w*", b"0", text)
    kind = re.sub(rb"[A-Za-z_\x80-\xff]+", b"a", numbers)
    of_kind, of_all = averages[zlib.crc32(kind) % _KINDS], averages[_KINDS]
    expected = (of_kind[1] + of_all[1] / max(of_all[0], 1)) / (of_kind[0] + 1)
    of_kind += 1, surprise
    of_all += 1, surprise
    return float(expected)


def above_quantile(
    units: Iterable[tuple[str, Unit]], quantile: float
) -> Iterator[tuple[str, Unit]]:
    """Yield the units of a stream that surprise more than this share of the last 10,000.

    The first ``1 / (1 - quantile)`` units never do.
    """
    recent = np.zeros(_RECENT)
    for count, (name, unit) in enumerate(units):
        known = recent[:count]
        # The product may be just below 1.
        if len(known) * (1 - quantile) >= 0.999 and np.mean(known < unit.surprise) > quantile:
            yield name, unit
        recent[count % _RECENT] = unit.surprise


def colored(block: ScoredBlock) -> list[tuple[int, str]]:
    """Split the text of a block into parts of one color, from 0; lines have parts of their own."""
    data = np.frombuffer(block.text, np.uint8)
    of_tokens = np.searchsorted(LEVELS, block.excess, side="right")
    begins = np.flatnonzero(data & 0xC0 != 0x80)
    of_characters = np.maximum.reduceat(of_tokens[block.token_of_bytes()], begins)
    cuts = (data[begins] == ord("\n")) | (np.diff(of_characters, prepend=-1) != 0)
    spans = itertools.pairwise([*np.flatnonzero(cuts).tolist(), len(begins)])
    text = block.text.decode()
    return [(int(of_characters[start]), text[start:end]) for start, end in spans]


def render_page(
    name: str,
    model: str,
    texts: Mapping[str, list[tuple[int, str]]],
    rows: Iterable[tuple[str, Unit, str | None]],
) -> str:
    """Return an HTML page of `colored` texts; `rows` are the units to list, with expected texts."""
    template = page_template("analysis/surprise.html")
    fields = {"name": name, "model": model, "levels": LEVELS, "texts": texts, "rows": rows}
    return template.render(title=f"What surprised the model in {name}", **fields)
