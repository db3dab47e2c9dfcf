"""`explain` of a text, its pictures, its page and its numbers."""

import dataclasses
import functools
import html
import io
import json
import logging
import re

import numpy as np
import pytest
from flax import nnx
from matplotlib.image import imread
from small_runs import small_config

from simplernn_jax.analysis import state_value
from simplernn_jax.analysis.decomposition import decompose_layers
from simplernn_jax.analysis.explanation import explain
from simplernn_jax.analysis.memory import half_gone
from simplernn_jax.analysis.page import draw_plots, make_page, summarize, to_numbers
from simplernn_jax.analysis.plots import add_legend, draw_bars, draw_heads, line_styles, new_figure
from simplernn_jax.analysis.state_value import ContextGain, choose_token, context_gains
from simplernn_jax.analysis.token_text import split_into_units
from simplernn_jax.data.tokenizer import ByteTokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.models import LanguageModel
from simplernn_jax.training.evaluate import Evaluator

pytestmark = pytest.mark.oldest_python

TEXT = "Für $x_1$ <b>&amp;\n\tund 漢字, 😀! " * 2
WORDS = "The quick brown fox jumps over the lazy dog and runs"
STATE_PICTURES = ["half_lives", "state_norm", "state_rank"]
VALUE_PICTURES = ["loss_by_position", "loss_by_reset", "contributions"]


def config_of(mixer):
    layers = {"num_layers": mixer.count(",") + 1, "mixer": mixer, "mixer_options": {"context": 11}}
    return small_config("residual", num_heads=2, **layers)


def model_of(mixer="simple_rnn"):
    return LanguageModel(config_of(mixer).model, rngs=nnx.Rngs(0))


@functools.cache
def explanation(mixer="simple_rnn", text=TEXT, token=60, map_tokens=16):
    options = {"token": token, "map_tokens": map_tokens}
    return explain(model_of(mixer), ByteTokenizer(), config_of(mixer), text, **options)


@functools.cache
def pictures(mixer="simple_rnn"):
    return draw_plots(explanation(mixer))


def page_of(mixer="simple_rnn", **changes):
    result = dataclasses.replace(explanation(mixer), **changes)
    return make_page(result, pictures(mixer), "a.txt", {})


def test_the_decomposition_is_exact_and_covers_the_token():
    result = explanation()
    assert (result.start, result.stop) == (46, 62)
    (layer,) = result.layers
    assert max(layer.operator_error, layer.layer_error) < 1e-6
    ids = [256, *TEXT.encode("utf-8")]
    assert list(result.tokens) == ids
    model = model_of()
    (whole,) = decompose_layers(model, np.array(ids[:62]), model.initial_state(1))
    np.testing.assert_allclose(layer.output[0], whole.output[0, 46:], rtol=1e-4, atol=1e-5)
    chosen = result.chosen
    assert (chosen.position, chosen.predicted.text) == (60, bytes(ids[60:61]).decode())
    assert (result.units[-1].stop, chosen.units[-1].stop) == (16, 14)
    shares = chosen.by_layer[0]
    assert shares.tokens.sum() + shares.state == pytest.approx(1, abs=1e-5)
    assert result.memory.positions[-1] == len(ids)
    assert result.state_value.evaluated == "the given text: 78 of its 78 predictions"
    assert list(result.state_value.by_reset) == [0, 4, 7, 16, 64]


def test_the_token_that_gains_most_from_distant_context_is_chosen(monkeypatch):
    def losses_with(evaluator, params, ids, count, context):
        assert (len(ids), count) == (40, 7)
        return np.linspace(3, 2, 7) if context == 32 else np.full(7, 4.0)

    monkeypatch.setattr(state_value, "short_context_losses", losses_with)
    losses = np.full(39, 2.0)
    losses[36] = 0.5  # token 37 gains 2.33 - 0.5
    unused = Evaluator(small_config(), 0), nnx.State({})
    means, gains = context_gains(*unused, np.zeros(40, np.int32), losses)
    full = losses[32:].mean()
    assert means == (7, pytest.approx(4 - full), pytest.approx(2.5 - full))
    token, reason = choose_token(gains, 40)
    assert token == 37
    assert reason.startswith("the text more than 32 tokens before it lowers its loss by 1.83")
    assert context_gains(*unused, np.zeros(33, np.int32), losses[:32]) == (None, {})
    token, reason = choose_token({}, 33)
    assert (token, reason) == (32, "it is the last one: none has more than 32 before it")


def with_gain(everything, far):
    return dataclasses.replace(explanation(), context_gain=ContextGain(1000, everything, far))


def test_the_page_opens_with_a_summary_in_numbers():
    lives = np.concatenate([layer.half_lives.ravel() for layer in explanation().memory.layers])
    text = " ".join(summarize(with_gain(2.0, 0.13)))
    per_token = len(TEXT) / len(TEXT.encode())
    assert np.mean(np.exp2(-half_gone(lives) / lives)) == pytest.approx(0.5)
    assert f"gone after {half_gone(lives) * per_token:.2g} characters (" in text
    assert f"only after {lives.max() * per_token:,.0f} characters ({lives.max():,.0f} token" in text
    assert "6.5% of the gain of its predictions from earlier text comes from more than 25" in text
    assert "measured on the last 1,000 predictions of this text" in text
    page = page_of()
    assert "<title>Explanation of a.txt</title>" in page
    order = ("<h1>", "In short", "<h2>1. The memory", "<h2>2. ", "<h2>3. ", "<h2>4. Attention maps")
    places = [page.index(part) for part in (*order, "<table")]
    assert places[:-1] == sorted(places[:-1])
    assert places[2] < places[-1]  # nothing but the summary comes before the sections


def test_norm_and_rank_of_the_state_are_folded():
    page = page_of()
    fold = page.split("<details>")[1].split("</details>")[0]
    assert re.findall(r'alt="(\w+)', fold) == ["Norm", "Effective"]
    assert page.count('alt="Effective rank') == 1
    assert "<details>" not in page_of("attention")


def that_forgets_nothing():
    memory = explanation().memory
    layers = [layer._replace(half_lives=np.full((1, 2), np.inf)) for layer in memory.layers]
    return dataclasses.replace(explanation(), memory=memory._replace(layers=tuple(layers)))


@pytest.mark.parametrize(
    ("result", "sentence", "expected"),
    [
        (lambda: with_gain(1.0, -0.1), 2, "does not help"),
        (lambda: with_gain(0.05, 0.08), 2, "All of the gain of its predictions from earlier text"),
        (lambda: with_gain(0.0, 0.0), 2, "does not improve the predictions at all"),
        (that_forgets_nothing, 0, "is gone after more characters than any text has"),
        (
            lambda: explanation("attention"),
            0,
            "Its layer of attention sees the last 8.7 characters (11 tokens)",
        ),
    ],
)
def test_the_summary_of_other_models(result, sentence, expected):
    assert expected in summarize(result())[sentence]


def test_a_weak_contribution_looks_weak():
    chosen = explanation().chosen
    weak = chosen.from_all._replace(tokens=np.full(len(chosen.from_all.tokens), 0.01))
    chosen = dataclasses.replace(chosen, from_all=weak)
    text = page_of(chosen=chosen).split("<pre>")[1].split("</pre>")[0]
    opacities = [float(part.split(")")[0]) for part in text.split("var(--red),")[1:]]
    units = [unit.stop - unit.start for unit in chosen.units]
    assert opacities == pytest.approx([0.014 * size for size in units])


def test_an_excerpt_begins_and_ends_with_a_word_and_stages_are_logged(caplog):
    with caplog.at_level(logging.INFO, "absl"):
        chosen = explanation(text=WORDS, token=38, map_tokens=24).chosen
    assert "".join(unit.text for unit in chosen.units) == "fox jumps over the la"
    assert (chosen.predicted.text, chosen.rest) == ("z", "y")
    stages = [line for line in caplog.messages if line.endswith(" ...")]
    assert "decomposing 1 layer ..." in stages
    assert len(stages) >= 6


def test_the_rest_of_a_word_is_after_the_character_of_the_token():
    def chosen(text, token):
        found = explanation(text=text, token=token, map_tokens=24).chosen
        return found.predicted.text, found.rest

    text = "the price is €5 and more of the same words for a while"
    assert chosen(text, 13) == (" ", "")
    assert chosen(text, 14) == ("\\xe2", "5")
    assert chosen(text, 4) == (" ", "")
    assert chosen(text, 5) == ("p", "rice")


@pytest.mark.parametrize(
    ("text", "token", "message"),
    [
        *(
            ("x" * 69, n, f"token {n}: the text has 69 tokens; specify one of 1")
            for n in (0, -1, 70)
        ),
        ("", None, "the text is empty"),
    ],
)
def test_a_missing_token_is_rejected(text, token, message):
    with pytest.raises(UserError, match=message):
        explain(None, ByteTokenizer(), small_config(), text, token=token)


@pytest.mark.parametrize(
    ("mixer", "names", "says", "omits"),
    [
        (
            "simple_rnn",
            ["map_layer_1", "state_share", *STATE_PICTURES, *VALUE_PICTURES],
            "A recurrence has",
            "ttention keeps",
        ),
        (
            "simple_rnn,attention",
            ["map_layer_1", "map_layer_2", "state_share", *STATE_PICTURES, *VALUE_PICTURES],
            "a state that fills up; its layers are left out here.",
            "no state",
        ),
        (
            "attention",
            ["map_layer_1", "state_share", *VALUE_PICTURES],
            "it has neither half-lives nor a state that fills up.",
            "A recurrence has",
        ),
    ],
)
def test_the_page_shows_the_pictures_and_errors_of_every_layer(mixer, names, says, omits):
    result, drawn = explanation(mixer), pictures(mixer)
    assert list(drawn) == names
    for picture in drawn.values():
        assert picture.png.startswith(b"\x89PNG\r\n")
        assert picture.caption.endswith(".")
    page = make_page(result, drawn, "a<small>.txt", {"model": "<small>"})
    assert not re.search(r"<(script|small)\b", page)  # texts and facts are escaped
    text = html.unescape(re.sub("<[^>]*>", "", page))
    assert "<small>" in text
    references = re.findall('(?:src|href)="([^"]*)"', page)
    assert len(references) == len(drawn)
    assert all(value.startswith("data:image/png;base64,") for value in references)
    assert says in text
    assert omits not in text
    for name, layer in zip(result.layer_names, result.layers, strict=True):
        assert f"{name}{layer.operator_error:.1e}{layer.layer_error:.1e}" in text
        assert max(layer.operator_error, layer.layer_error) < 1e-6
    titles = [drawn[f"map_layer_{n + 1}"].title for n in range(len(result.layers))]
    assert titles == [f"Attention map of {name}" for name in result.layer_names]


def test_one_is_singular():
    result = explanation(text="x", token=None)
    assert result.state_value.evaluated == "the given text: 1 of its 1 prediction"
    assert "1 token and BOS" in make_page(result, draw_plots(result), "a.txt", {})


def test_numbers_are_json_and_reproduce_an_output():
    numbers = json.loads(json.dumps(to_numbers(explanation()), allow_nan=False))
    assert numbers["tokens"] == list(explanation().tokens)
    layer = explanation().layers[0]
    head = numbers["layers"][0]["map"][1]
    assert [len(row) for row in head] == list(range(1, 17))
    exact = np.asarray(layer.weights)[0, 1]
    largest = np.abs(exact).max()
    for row, weights in zip(head, exact, strict=True):
        np.testing.assert_allclose(row, weights[: len(row)], atol=0.6e-3 * largest)
        assert all(len(f"{weight:.9g}".lstrip("-0.")) <= 4 for weight in row)
    values = np.asarray(layer.values)[0, :, 1]
    rebuilt = np.array([row @ values[: len(row)] for row in map(np.asarray, head)])
    expected = (layer.output - layer.from_state)[0, :, 1]
    np.testing.assert_allclose(rebuilt, expected, atol=2e-3 * np.abs(expected).max())
    assert numbers["context_gain"]["predictions"] == 46
    assert [loss["reset_every"] for loss in numbers["loss_by_reset"]] == [0, 4, 7, 16, 64]
    recurrence, attention = to_numbers(explanation("simple_rnn,attention"))["layers"]
    assert (recurrence["mixer"], attention["mixer"]) == ("simple_rnn", "attention")
    own = {"half_lives", "state_norm", "state_effective_rank"}
    assert recurrence.keys() - attention.keys() == own


def test_curves_differ_in_more_than_their_color():
    styles = line_styles(12, 200)
    assert len({(style["linestyle"], style["marker"]) for style in styles}) == 12
    assert len({style["markevery"] for style in styles}) == 12


@pytest.mark.parametrize(
    ("names", "rows"), [("layer", 2), ("a label of forty-four characters or so,", 8)]
)
def test_a_legend_is_above_the_curves(names, rows):
    with new_figure(5.8, 4) as figure:
        axes = figure.subplots()
        for number in range(12):
            axes.plot([0, number], label=f"{names} {number}")
        add_legend(figure, axes)
        figure.draw_without_rendering()
        legend = figure.legends[0].get_window_extent()
        assert legend.y0 >= axes.get_window_extent().y1
        assert legend.x0 >= 0
        assert legend.x1 <= figure.bbox.x1
        assert figure.get_figheight() == pytest.approx(4 + 0.2 * rows)


def png_size(picture):
    return [int.from_bytes(picture[start : start + 4], "big") for start in (16, 20)]


def test_maps_grow_with_their_tokens_up_to_a_limit():
    sizes = []
    for length in (101, 401, 1009):
        units = split_into_units(ByteTokenizer(), [256, *b"x" * (length - 1)])
        sizes.append(png_size(draw_heads(np.eye(length)[None], units, 0, 3)))
    (small, _), (middle, _), (large, height) = sizes
    assert small < 1000 < middle < 1650 < large < 2130
    assert height < 2130


def test_a_long_note_below_bars_is_not_cut():
    units = split_into_units(ByteTokenizer(), "漢字漢字漢字".encode())  # drawn as escapes
    panel = ("title", "share of the output", np.arange(6.0), -1.234e-05)
    pixels = imread(io.BytesIO(draw_bars([panel], units)))
    for margin in (pixels[:, :3], pixels[:, -3:]):
        assert margin.min() == 1  # white


def test_characters_without_a_glyph_are_drawn_without_a_warning():
    units = split_into_units(ByteTokenizer(), [256, *"漢字😀 ".encode()])
    picture = draw_bars([("title", "nats", np.arange(5.0), 7.0)], units)
    assert picture.startswith(b"\x89PNG\r\n")
