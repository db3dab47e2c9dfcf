"""An `Explanation` in a few sentences for somebody who has not read about language models."""

import math

import numpy as np

from simplernn_jax.analysis.context_gain import SHORT_CONTEXT
from simplernn_jax.analysis.explanation import Explanation
from simplernn_jax.analysis.memory import half_gone
from simplernn_jax.analysis.token_text import quoted
from simplernn_jax.errors import counted


def summarize(explanation: Explanation) -> list[str]:
    """Sentences with the numbers of this model and text: what it keeps, for how long, what for."""
    sentences = [*_of_memory(explanation), *_of_attention(explanation)]
    sentences.append(_of_gain(explanation))
    chosen = explanation.chosen
    sentences.append(
        f"The page takes one prediction apart: {quoted(chosen.predicted.text)}, number "
        f"{chosen.position:,} of the text, to which the model gave a probability of "
        f"{math.exp(-chosen.nats):.1%}."
    )
    return sentences


def _of_memory(explanation: Explanation) -> list[str]:
    lives = [layer.half_lives.ravel() for layer in explanation.memory.layers if layer is not None]
    if not lives:
        return []
    every = np.concatenate(lives)
    half = _reach(explanation, half_gone(every))
    longest = _reach(explanation, float(every.max()))
    return [
        "The model reads a text once, from left to right, and carries a memory of fixed size "
        f"along. On average, half of what it writes into this memory is gone after {half}.",
        f"Of the {every.size:,} channels of its memory, the most lasting one loses half only "
        f"after {longest}.",
    ]


def _of_attention(explanation: Explanation) -> list[str]:
    number = explanation.mixers.count("attention")
    if not number:
        return []
    reach = _reach(explanation, explanation.attention_context)
    who = "Its layer of attention sees" if number == 1 else "Its layers of attention each see"
    return [f"{who} the last {reach} exactly, and nothing from before them."]


def _of_gain(explanation: Explanation) -> str:
    gain = explanation.context_gain
    far = _reach(explanation, SHORT_CONTEXT)
    if gain is None:
        return f"The text is too short to say what is gained from more than {far} back."
    where = f"measured on the last {counted(gain.predictions, 'prediction')} of this text"
    if gain.everything <= 0:
        return (
            "What stands more than one token back does not improve the predictions at all "
            f"({where})."
        )
    share = gain.far / gain.everything
    if share <= 0:
        return (
            f"Text more than {far} back does not help: without it, the predictions are as good or "
            f"better ({where})."
        )
    return (
        f"{share:.1%} of what its predictions gain from reading back comes from text more than "
        f"{far} back ({where}); the rest comes from nearer text."
    )


def _reach(explanation: Explanation, tokens: float) -> str:
    """A distance in the text, in characters and, where these are others, in tokens."""
    if math.isinf(tokens):
        return "more characters than any text has"
    ratio = explanation.characters_per_token
    shown = _roughly(tokens * ratio, "character")
    return (
        shown
        if math.isclose(ratio, 1, abs_tol=1e-3)
        else (f"{shown} ({_roughly(tokens, 'token')})")
    )


def _roughly(number: float, noun: str) -> str:
    """``1 token``, ``2.8 tokens`` or ``1,234 tokens``: two digits, or whole from 10 on."""
    text = f"{number:,.0f}" if number >= 10 else f"{number:.2g}"
    return f"{text} {noun}" if text == "1" else f"{text} {noun}s"
