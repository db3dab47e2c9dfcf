"""All pictures of an `Explanation`, each with one sentence that says how to read it."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from simplernn_jax.analysis import curve_pictures, map_pictures
from simplernn_jax.analysis.contributions import Contributions
from simplernn_jax.analysis.explanation import Explanation
from simplernn_jax.analysis.token_text import sum_by_unit


class Picture(NamedTuple):
    """A PNG with what a reader needs beside it."""

    name: str
    """Of its file, without the ending."""
    title: str
    how_to_read: str
    png: bytes


def draw_pictures(explanation: Explanation) -> dict[str, Picture]:
    """All pictures, by the name of their file."""
    return {picture.name: picture for picture in _pictures(explanation)}


def _pictures(explanation: Explanation) -> Iterator[Picture]:
    yield from _map_pictures(explanation)
    window = explanation.state_value.window
    if explanation.memory.layers.count(None) < len(explanation.memory.layers):
        yield Picture(
            "half_lives",
            "Half-life of every key channel, sorted",
            "A point at 100 means that this channel keeps half of what was written after 100 "
            "tokens, on average over this text (ln 2 / E[-log g]); a line that stays high to the "
            "right is a layer with many long memories.",
            curve_pictures.draw_half_lives(explanation.memory, window),
        )
        yield Picture(
            "state_norm",
            "How full the state is along the text",
            "Frobenius norm of each head's state: a line that keeps rising is a state that is "
            "still filling, a sudden fall is a text that made the head forget.",
            curve_pictures.draw_state(explanation.memory, "norms"),
        )
        yield Picture(
            "state_rank",
            "In how many directions the state is used",
            "An effective rank of 8 means that a head's state holds about 8 independent directions "
            "(exp of the entropy of its singular values as shares of their sum, Roy and Vetterli "
            "2007); the most it could hold is the smaller of its key and value channels.",
            curve_pictures.draw_state(explanation.memory, "ranks"),
        )
    yield Picture(
        "loss_by_position",
        "Loss by position in the document",
        "A blue line that falls to the right means better predictions with more of the document "
        "read (bars: two standard errors; a point stands for a range of positions, each twice as "
        "long as the one before). Orange above blue is what the state brings over from before the "
        "last reset; where orange lies below blue, that does harm: the model predicts better "
        "without it.",
        curve_pictures.draw_position_loss(explanation.state_value.by_position, window),
    )
    yield Picture(
        "loss_by_reset",
        "Loss when the state is cleared now and then",
        "Orange above blue: tokens further back than that still help. Where the two meet, they "
        "add nothing; where orange falls below blue, they do harm: the model predicts better once "
        "they are cleared away.",
        curve_pictures.draw_reset_loss(explanation.state_value.by_reset, window),
    )
    yield _contribution_picture(explanation)


def _map_pictures(explanation: Explanation) -> Iterator[Picture]:
    row = explanation.chosen.position - 1 - explanation.start
    shares: dict[str, np.ndarray] = {}
    for number, (name, account) in enumerate(
        zip(explanation.layer_names, explanation.accounts, strict=True), 1
    ):
        parts = np.linalg.norm(account.from_state[0], axis=(-2, -1))
        whole = np.linalg.norm(account.output[0], axis=(-2, -1))
        shares[name] = parts / np.maximum(whole, np.finfo(np.float32).tiny)
        yield Picture(
            f"map_layer_{number}",
            f"Attention map of {name}",
            "Each row is one output and each column an earlier token, labelled with the text that "
            "begins there: red adds that token's value, blue (in a recurrence only) subtracts it, "
            "white leaves it out; full color is the largest weight of the head, which stands above "
            "it, and a hundredth of that is faint. The dotted line is the output that predicts the "
            "chosen token.",
            map_pictures.draw_maps(
                np.asarray(account.weights[0]), explanation.units, explanation.start, row
            ),
        )
    if explanation.start:
        yield Picture(
            "state_share",
            "What comes from before the maps",
            "Length of the part of each output that the state before the first token of the maps "
            "gives (in attention, its cache), beside that of the whole output: 0 means that all is "
            "explained by the map alone.",
            map_pictures.draw_state_share(shares, explanation.units, explanation.start),
        )


def _contribution_picture(explanation: Explanation) -> Picture:
    chosen = explanation.chosen
    panels = [
        (
            "through all layers, by gradient",
            "gradient times input (nats)",
            sum_by_unit(chosen.units, chosen.from_all.tokens),
            chosen.from_all.state,
        )
    ]
    for name, given in zip(explanation.layer_names, chosen.by_layer, strict=True):
        values = units_given(explanation, given)
        panels.append((f"{name}, by its map", "share of the output", values, given.state))
    return Picture(
        "contributions",
        "The tokens that gave most to the chosen prediction",
        "Each bar is one earlier token, in brackets in its word, with its distance to the "
        "predicted one: red speaks for the prediction (in a layer: for its output), blue against.",
        map_pictures.draw_contributions(panels, chosen.units),
    )


def units_given(explanation: Explanation, given: Contributions) -> np.ndarray:
    """[units]: what each unit before the chosen token gave; `given` is a layer's."""
    chosen = explanation.chosen
    return sum_by_unit(chosen.units, given.tokens[: chosen.position - explanation.start])
