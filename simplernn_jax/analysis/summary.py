"""Summary of an `Explanation` in a few sentences for readers new to language models."""

import math

import numpy as np

from simplernn_jax.analysis.explanation import Explanation
from simplernn_jax.analysis.memory import half_gone
from simplernn_jax.analysis.state_value import SHORT_CONTEXT
from simplernn_jax.analysis.token_text import quoted
from simplernn_jax.errors import counted


def summarize(explanation: Explanation) -> list[str]:
    """Return sentences on the model's memory and its use, with the numbers of this text."""
    chosen = explanation.chosen
    return [
        *_memory(explanation),
        *_attention(explanation),
        _gain(explanation),
        f"The page decomposes one prediction: {quoted(chosen.predicted.text)}, number "
        f"{chosen.position:,} of the text, to which the model gave a probability of "
        f"{math.exp(-chosen.nats):.1%}.",
    ]


def _memory(explanation: Explanation) -> list[str]:
    lives = [layer.half_lives.ravel() for layer in explanation.memory.layers if layer is not None]
    if not lives:
        return []
    every = np.concatenate(lives)
    half = _distance(explanation, half_gone(every))
    longest = _distance(explanation, float(every.max()))
    return [
        "The model reads a text once, from left to right, and carries a memory of fixed size "
        f"along. On average, half of the content of this memory is gone after {half}.",
        f"Of the {every.size:,} channels of its memory, the longest-lived loses half only "
        f"after {longest}.",
    ]


def _attention(explanation: Explanation) -> list[str]:
    number = explanation.mixers.count("attention")
    if not number:
        return []
    distance = _distance(explanation, explanation.attention_context)
    subject = "Its layer of attention sees" if number == 1 else "Its layers of attention each see"
    return [f"{subject} the last {distance} exactly, and nothing before them."]


def _gain(explanation: Explanation) -> str:
    gain = explanation.context_gain
    far = _distance(explanation, SHORT_CONTEXT)
    if gain is None:
        return f"The text is too short to measure the gain from more than {far} back."
    where = f"measured on the last {counted(gain.predictions, 'prediction')} of this text"
    if gain.everything <= 0:
        return f"Text more than one token back does not improve the predictions at all ({where})."
    share = gain.far / gain.everything
    if share <= 0:
        return (
            f"Text more than {far} back does not help: without it, the predictions are as good or "
            f"better ({where})."
        )
    if share > 1:
        return (
            f"All of the gain of its predictions from earlier text comes from more than {far} back "
            f"({where}): nearer text alone makes them worse."
        )
    return (
        f"{share:.1%} of the gain of its predictions from earlier text comes from more than "
        f"{far} back ({where}); the rest comes from nearer text."
    )


def _distance(explanation: Explanation, tokens: float) -> str:
    """Return a distance in characters and, if the numbers differ, in tokens."""
    if math.isinf(tokens):
        return "more characters than any text has"
    ratio = explanation.characters_per_token
    shown = _rounded(tokens * ratio, "character")
    is_same = math.isclose(ratio, 1, abs_tol=1e-3)
    return shown if is_same else f"{shown} ({_rounded(tokens, 'token')})"


def _rounded(number: float, noun: str) -> str:
    """Return ``1 token``, ``2.8 tokens`` or ``1,234 tokens``: two digits, or whole above 10."""
    text = f"{number:,.0f}" if number >= 10 else f"{number:.2g}"
    return f"{text} {noun}" if text == "1" else f"{text} {noun}s"
