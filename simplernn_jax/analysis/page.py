"""The page about an `Explanation`: a summary, then four parts from results to details."""

from collections.abc import Iterator, Mapping

import numpy as np

from simplernn_jax.analysis.explanation import Explanation
from simplernn_jax.analysis.gallery import Picture, units_given
from simplernn_jax.analysis.html_parts import (
    color_scale,
    document,
    facts_list,
    figure,
    heading,
    paragraph,
    shaded_text,
    summary,
    table,
)
from simplernn_jax.analysis.summary import summarize
from simplernn_jax.analysis.token_text import quoted, sum_by_unit
from simplernn_jax.config_rules import MIXERS
from simplernn_jax.errors import counted

TITLE = "What the model did with a text"

_FULL_SHARE = 0.5
"""Share of a layer's output that has full color behind a text."""

_LEAST_FULL_NATS = 0.5
"""What has full color has at least so many nats: less would make weak contributions look strong."""

_WEIGHTS = {
    "simple_rnn": "A recurrence has A_tj = sum over key channels of q_t k_j times all gates from "
    "j + 1 to t: an exact implicit attention map.",
    "attention": "Softmax attention has A_tj = softmax over j of q_t k_j / sqrt(K) by definition, "
    "over the last tokens that it looks back on.",
}


def make_page(
    explanation: Explanation, pictures: Mapping[str, Picture], facts: Mapping[str, str]
) -> str:
    """The HTML of the page.

    Args:
      explanation: what it is about.
      pictures: those of `draw_pictures`.
      facts: name and value of what a reader should know of the model.
    """
    chosen = explanation.chosen
    facts = {
        **facts,
        "text": f"{counted(len(explanation.tokens) - 1, 'token')} and BOS, which is token 0",
        "maps": f"tokens {explanation.start:,} to {explanation.stop - 1:,} of it",
        "prediction": f"token {chosen.position:,}, {quoted(chosen.predicted.text)}",
    }
    parts = [
        summary(summarize(explanation)),
        facts_list(facts),
        *_memory_part(explanation, pictures),
        *_value_part(explanation, pictures),
        *_prediction_part(explanation, pictures),
        *_attention_part(explanation, pictures),
    ]
    return document(TITLE, parts)


def _attention_part(explanation: Explanation, pictures: Mapping[str, Picture]) -> Iterator[str]:
    yield heading("4. What every output is made of")
    yield paragraph(
        "Every output of a layer is y_t = sum over j of A_tj v_j, plus what the state before the "
        "first token gives. " + " ".join(_WEIGHTS[mixer] for mixer in _used_mixers(explanation))
    )
    yield paragraph(
        "The table says how far that sum is from what the operator, scan or softmax attention, "
        "makes of the same inputs, and how far the layer's output is from the model's own when it "
        "is made from that sum: RMS of the difference over RMS of the output. In higher layers, "
        "token j stands for all that the layers below gathered there."
    )
    rows = [
        (name, f"{account.operator_error:.1e}", f"{account.layer_error:.1e}")
        for name, account in zip(explanation.layer_names, explanation.accounts, strict=True)
    ]
    yield table(("error of the map", "beside the operator", "beside the layer's output"), rows)
    for name, picture in pictures.items():
        if name.startswith("map_layer_") or name == "state_share":
            yield _figure(picture)


def _used_mixers(explanation: Explanation) -> list[str]:
    return [mixer for mixer in MIXERS if mixer in explanation.mixers]


def _memory_part(explanation: Explanation, pictures: Mapping[str, Picture]) -> Iterator[str]:
    yield heading("1. The memory of the model")
    used = _used_mixers(explanation)
    if "attention" in used:
        yield paragraph(
            "Attention keeps the keys and values of its last tokens as they are: it has neither "
            "half-lives nor a state that fills up"
            + ("; its layers are left out here." if len(used) > 1 else ".")
        )
    window = explanation.state_value.window
    rows = []
    for number, layer in enumerate(explanation.memory.layers, 1):
        if layer is not None:
            lives = layer.half_lives.ravel()
            rows.append(
                (
                    f"layer {number}",
                    f"{np.median(lives):,.1f}",
                    f"{lives.max():,.1f}",
                    f"{np.sum(lives > window):,} of {lives.size:,}",
                )
            )
    if rows:
        longer = f"channels beyond {counted(window, 'token')}"
        yield table(("half-life in tokens", "median", "longest", longer), rows)
    for name in ("half_lives", "state_norm", "state_rank"):
        if name in pictures:
            yield _figure(pictures[name])


def _value_part(explanation: Explanation, pictures: Mapping[str, Picture]) -> Iterator[str]:
    value = explanation.state_value
    yield heading("2. What the state is worth")
    yield paragraph(f"Evaluated on {value.evaluated}, the same ones each time.")
    if "attention" in explanation.mixers:
        yield paragraph("The state of attention is its cache of keys and values.")
    yield _figure(pictures["loss_by_position"])
    yield _figure(pictures["loss_by_reset"])
    rows = []
    for interval, result in sorted(value.by_reset.items(), key=lambda item: item[0] or np.inf):
        name = f"reset every {counted(interval, 'token')}" if interval else "carried, never reset"
        name += " (every training window)" if interval == value.window else ""
        rows.append((name, f"{result.nats_per_token:.4f}", f"{result.bits_per_byte:.4f}"))
    yield table(("state", "nats/token", "bits/byte"), rows)


def _prediction_part(explanation: Explanation, pictures: Mapping[str, Picture]) -> Iterator[str]:
    chosen = explanation.chosen
    yield heading("3. What one prediction is made of")
    yield paragraph(
        f"The prediction of token {chosen.position:,}, framed below, with a loss of "
        f"{chosen.nats:.3f} nats (probability {np.exp(-chosen.nats):.3g}). "
        f"Chosen because: {chosen.reason}."
    )
    rest = "the rest of its word, which the model has not read, is gray. " if chosen.rest else ""
    given = sum_by_unit(chosen.units, chosen.from_all.tokens)
    strongest = max(float(np.abs(given).max()), _LEAST_FULL_NATS)
    yield paragraph(
        "Through all layers: the gradient of its log-probability times the embedding of each "
        "earlier token. Red tokens made the prediction more probable, blue ones less; "
        f"{rest}To first order only."
    )
    yield color_scale(f"{strongest:.2g} nats")
    yield shaded_text(chosen.units, given, strongest, chosen.predicted, chosen.rest)
    yield color_scale(f"{_FULL_SHARE:.0%} of the output, or more")
    for name, part in zip(explanation.layer_names, chosen.by_layer, strict=True):
        yield paragraph(
            f"{name.capitalize()}, by its map: share of each token in the output after the last "
            f"token, mean over heads; all shares add up to 1"
            + (f", {part.state:z.3f} of it from before this stretch." if part.state else ".")
        )
        shares = units_given(explanation, part)
        yield shaded_text(chosen.units, shares, _FULL_SHARE, chosen.predicted, chosen.rest)
    yield _figure(pictures["contributions"])


def _figure(picture: Picture) -> str:
    return figure(picture.png, picture.title, picture.how_to_read, f"{picture.name}.png")
