"""`explain` of a text, its pictures, its page and its numbers."""

import functools
import html
import io
import json
import re

import numpy as np
import pytest
from matplotlib.image import imread
from small_data import make_split
from small_runs import small_config, small_model

from simplernn_jax.analysis.decomposition import Contributions, decompose_layers
from simplernn_jax.analysis.explanation import Unit, explain, split_into_units
from simplernn_jax.analysis.page import draw_plots, make_page, to_numbers
from simplernn_jax.analysis.plots import (
    add_legend,
    draw_contributions,
    new_figure,
    sum_by_unit,
    visible,
)
from simplernn_jax.data.tokenizer import ByteTokenizer
from simplernn_jax.errors import UserError

BYTES = ByteTokenizer()
TEXT = "Für $x_1$ <b>&amp;\n\tund 漢字, 😀! " * 2
VALUE_PICTURES = ["loss_by_position", "contributions"]


def fields_of(mixer):
    layers = {"num_layers": mixer.count(",") + 1, "mixer": mixer, "mixer_options": {"context": 11}}
    return {"block": "parallel", "num_heads": 2, **layers}


@functools.cache
def explanation(mixer="simple_rnn", text=TEXT, token=60, held_out=None):
    model, config = small_model(**fields_of(mixer)), small_config(**fields_of(mixer))
    options = {"token": token, "map_tokens": 16, "validation": held_out and make_split(held_out)}
    return explain(model, ByteTokenizer(), config, text, **options)


@functools.cache
def pictures(mixer="simple_rnn"):
    return draw_plots(explanation(mixer))


def test_the_decomposition_is_exact_and_covers_the_token():
    result = explanation()
    assert (result.start, result.stop) == (46, 62)
    (layer,) = result.layers
    assert max(layer.operator_error, layer.layer_error) < 1e-6
    ids = [256, *TEXT.encode("utf-8")]
    assert list(result.tokens) == ids
    model = small_model(**fields_of("simple_rnn"))
    (whole,) = decompose_layers(model, np.array(ids[:62]), model.initial_state(1))
    np.testing.assert_allclose(layer.output[0], whole.output[0, 46:], rtol=1e-4, atol=1e-5)
    chosen = result.chosen
    assert (chosen.position, chosen.predicted.text) == (60, bytes(ids[60:61]).decode())
    assert (result.units[-1].stop, chosen.units[-1].stop) == (16, 14)
    shares = chosen.by_layer[0]
    assert len(shares.tokens) == len(chosen.from_all.tokens) == 14
    assert shares.tokens.sum() + shares.state == pytest.approx(1, abs=1e-5)
    assert result.evaluated == "the given text: 78 of its 78 predictions"
    assert list(result.by_reset) == [0, 4, 7, 16, 64]


@pytest.mark.parametrize(("length", "is_held_out"), [(78, True), (77, False)])
def test_a_short_text_is_evaluated_on_longer_held_out_text(length, is_held_out):
    result = explanation(held_out=(length,))
    name = "the validation split of the run (documents: 1)" if is_held_out else "the given text"
    assert result.evaluated.startswith(f"{name}: ")


@pytest.mark.parametrize("length", [1, 40])
def test_the_token_that_gains_most_from_distant_context_is_chosen(length):
    result = explanation(text=TEXT[:length], token=None)
    gains, chosen = result.context_gains, result.chosen
    num_tokens = len(result.tokens)
    assert len(gains) == max(0, num_tokens - 33)
    if length == 1:
        assert (chosen.position, chosen.reason[:18]) == (1, "it is the last one")
    else:
        assert gains[chosen.position - num_tokens] == gains.max()
        assert f"lowers its loss by {gains.max():.2f} nats" in chosen.reason


def test_the_page_opens_with_a_summary_in_numbers():
    (lives,) = explanation().half_lives
    page = make_page(explanation(), pictures(), "a.txt", {})
    text = " ".join(page.split("In short")[1].split("</section>")[0].split())
    assert f"within {np.median(lives):,.1f} tokens, " in text
    assert f"only after {lives.max():,.1f} tokens." in text
    gain = explanation().context_gains.mean()
    assert f"the last 46 predictions by {gain:.3f} nats per token" in text


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
            ["map_layer_1", "half_lives", *VALUE_PICTURES],
            "A recurrence has",
            "ttention keeps",
        ),
        (
            "simple_rnn,attention",
            ["map_layer_1", "map_layer_2", "half_lives", *VALUE_PICTURES],
            "a state that fills up; its layers are left out here.",
            "no state",
        ),
        (
            "attention",
            ["map_layer_1", *VALUE_PICTURES],
            "it has neither half-lives nor a state that fills up.",
            "A recurrence has",
        ),
    ],
)
def test_the_page_shows_the_pictures_and_errors_of_every_layer(mixer, names, says, omits):
    result, drawn = explanation(mixer), pictures(mixer)
    assert list(drawn) == names
    assert all(picture.startswith(b"\x89PNG\r\n") for picture in drawn.values())
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
        assert f'alt="Attention map of {name}"' in page
        assert max(layer.operator_error, layer.layer_error) < 1e-6


def test_a_text_of_one_token():
    result = explanation(text="x", token=None)
    assert result.evaluated == "the given text: 1 of its 1 prediction"
    assert "1 token and BOS" in make_page(result, draw_plots(result), "a.txt", {})


def test_numbers_are_json_and_reproduce_an_output():
    numbers = json.loads(json.dumps(to_numbers(explanation()), allow_nan=False))
    assert numbers["tokens"] == list(explanation().tokens)
    layer = explanation().layers[0]
    head = numbers["layers"][0]["map"][1]
    assert [len(row) for row in head] == list(range(1, 17))
    values = np.asarray(layer.values)[0, :, 1]
    rebuilt = np.array([row @ values[: len(row)] for row in map(np.asarray, head)])
    expected = (layer.output - layer.from_state)[0, :, 1]
    np.testing.assert_allclose(rebuilt, expected, atol=1e-5 * np.abs(expected).max())
    assert len(numbers["context_gains"]) == 46
    assert list(numbers["by_reset"]) == ["0", "4", "7", "16", "64"]
    assert numbers["chosen"]["predicted"]["text"] == explanation().chosen.predicted.text
    recurrence, attention = to_numbers(explanation("simple_rnn,attention"))["half_lives"]
    assert (len(recurrence), attention) == (2, None)


def test_a_legend_is_above_the_curves():
    with new_figure(5.8, 4) as figure:
        axes = figure.subplots()
        for number in range(12):
            axes.plot([0, number], label=f"a label of forty-four characters or so, {number}")
        add_legend(figure, axes)
        figure.draw_without_rendering()
        legend = figure.legends[0].get_window_extent()
        assert legend.y0 >= axes.get_window_extent().y1
        assert 0 <= legend.x0 < legend.x1 <= figure.bbox.x1


def test_labels_and_notes_of_bars_are_not_cut_and_need_no_glyph():
    units = split_into_units(ByteTokenizer(), "漢字漢😀漢字".encode())
    shares = Contributions(np.repeat(np.arange(6.0), [3, 3, 3, 4, 3, 3]), -1.234e-05)
    panel = ("title", "share of the output", shares)
    pixels = imread(io.BytesIO(draw_contributions([panel], units)))
    for margin in (pixels[:, :3], pixels[:, -3:]):
        assert margin.min() == 1  # white


def test_bytes_of_one_character_are_one_unit():
    ids = [BYTES.bos_id, *BYTES.encode("aé漢\n").tolist(), BYTES.eos_id]
    units = split_into_units(BYTES, ids)
    assert [unit.text for unit in units] == ["⟨BOS⟩", "a", "é", "漢", "\n", "⟨EOS⟩"]
    assert [(unit.start, unit.stop) for unit in units[1:5]] == [(1, 2), (2, 4), (4, 7), (7, 8)]
    np.testing.assert_array_equal(sum_by_unit(units, np.arange(9.0)), [0, 1, 5, 15, 7, 8])


@pytest.mark.parametrize(("cut", "name"), [(1, "\\xe6"), (2, "\\xe6\\xbc")])
def test_a_split_character_shows_its_bytes_and_is_completed_after_its_context(cut, name):
    ids = BYTES.encode("漢a")
    assert split_into_units(BYTES, ids[:cut]) == [Unit(0, cut, name)]
    rest = split_into_units(BYTES, ids[cut:], context=ids[:cut])
    assert rest == [Unit(0, 3 - cut, "漢"), Unit(3 - cut, 4 - cut, "a")]


def test_units_hold_every_token_once():
    units = split_into_units(BYTES, np.random.default_rng(0).integers(0, 259, 97))
    assert [unit.start for unit in units] == [0, *(unit.stop for unit in units[:-1])]
    assert units[-1].stop == 97


def test_invisible_characters_are_shown():
    assert visible("a b\n\tc\x00\u200b") == "a·b⏎⇥c\ufffd\ufffd"
