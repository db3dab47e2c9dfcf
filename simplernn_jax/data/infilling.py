"""Text presented for filling in the middle (Bavarian et al., 2022), as completion needs it.

A document is cut into segments. Some of them are rearranged, with the ids of
`Tokenizer.fim_ids` before their parts, and others stay::

    BOS text <prefix> <suffix> s <middle> p m EOS text ... EOS

The state is carried from one to the next: earlier text of a document is context, as it is in the
prompt of a completion, ``BOS older text <prefix> <suffix> s <middle> p``. In this order, that of
SPM in the paper, the middle continues the prefix, and a prompt grows at its end while one types;
``prefix_first`` is ``<prefix> p <suffix> s <middle> m EOS``, PSM. The ids themselves are no
targets; text, and the EOS that ends each middle, are.
"""

import random
from collections.abc import Sequence

import numpy as np

from simplernn_jax.data.documents import utf8
from simplernn_jax.data.tokenizer import InfillingTokenizer, Tokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.files import sha256_hex

_SHORTEST, _LONGEST = 32, 768
"""Characters of a segment, uniformly distributed."""
_AT_START, _AT_END = 0.05, 0.15
"""Probability that nothing is before the cursor, and that nothing is after the middle."""
_LINE = 0.7
"""Probability that a middle ends with the cursor's line; else it ends at a random place."""
_GRID = 256
_MOST_SUFFIX = 384
"""Characters of the suffix in a prompt."""


def present(tokenizer: Tokenizer, text: str, rate: float, seed: int) -> np.ndarray:
    """Encode a piece of a document as [n] int32 ids; all draws follow from `seed` and `text`.

    Args:
      tokenizer: an `InfillingTokenizer`.
      text: what is encoded, each character once.
      rate: probability that a segment is rearranged.
      seed: of the draws.

    Raises:
      UserError: as for `Tokenizer.encode`.
    """
    # `random.random` is the same in every version of Python; its other draws need not be.
    draw = random.Random(sha256_hex(b"%d " % seed + utf8(text))).random
    parts, start = [np.empty(0, np.int32)], 0
    while start < len(text):
        stop = min(len(text), start + _SHORTEST + int(draw() * (_LONGEST - _SHORTEST)))
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        if draw() >= rate:
            parts.append(tokenizer.encode(text[start:stop]))
        else:
            cursor = start if draw() < _AT_START else start + int(draw() * (stop - start + 1))
            end = cursor + int(draw() * (stop - cursor + 1))
            if draw() < _LINE:
                end = text.find("\n", cursor, stop)
                end = stop if end < 0 else end
            if end > start and draw() < _AT_END:
                stop = end
            parts += _around(tokenizer, text[start:cursor], text[end:stop])
            parts += tokenizer.encode(text[cursor:end]), np.array([tokenizer.eos_id])
        start = stop
    return np.concatenate(parts, dtype=np.int32)


def _around(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[np.ndarray]:
    """Encode what is around a middle, and comes before it."""
    if not isinstance(tokenizer, InfillingTokenizer):
        raise UserError(
            "this model does not fill in the middle: it was not trained with config.data.fim_rate "
            "above 0; train one with --config configs/complete.py, or pass no suffix"
        )
    before_suffix, before_prefix, before_middle = (np.array([x]) for x in tokenizer.fim_ids)
    p, s = tokenizer.encode(prefix), tokenizer.encode(suffix)
    if tokenizer.order == "prefix_first":
        return [before_prefix, p, before_suffix, s, before_middle]
    return [before_prefix, before_suffix, s, before_middle, p]


def infill_ids(
    tokenizer: Tokenizer, prefix: str, suffix: str, extra: Sequence[str] = ()
) -> np.ndarray:
    """Encode the prompt of a completion between `prefix` and `suffix`, as training presents it.

    One more character of the prefix changes only the end of the prompt, unless the prefix passes a
    multiple of 256 characters: then more of it becomes older text, before the suffix.

    Args:
      tokenizer: of a model that was trained with ``data.fim_rate``.
      prefix: the text before the cursor.
      suffix: the text after it; its first 384 characters are used, up to the end of a line.
      extra: other texts, such as files of the same project, before all of it.

    Returns:
      [n] int32 ids, with BOS; the completion follows, up to EOS.

    Raises:
      UserError: the model does not fill in, or a text has no ids.
    """
    cut = max(0, len(prefix) // _GRID - 1) * _GRID
    cut = prefix.rfind("\n", cut - _GRID, cut) + 1 or cut
    if len(suffix) > _MOST_SUFFIX:
        suffix = suffix[: suffix.rfind("\n", _MOST_SUFFIX // 2, _MOST_SUFFIX) + 1 or _MOST_SUFFIX]
    around = _around(tokenizer, prefix[cut:], suffix)
    older = [tokenizer.encode(text) for text in (*extra, prefix[:cut]) if text]
    return np.concatenate([[tokenizer.bos_id], *older, *around], dtype=np.int32)
