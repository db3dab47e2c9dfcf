"""From a text to the page: `explain`, its pictures, its HTML and its numbers."""

import dataclasses
import functools
import html.parser
import json

import numpy as np
import pytest
from flax import nnx
from small_runs import small_config

from simplernn_jax.analysis import context_gain, progress
from simplernn_jax.analysis.context_gain import choose_token, context_gains
from simplernn_jax.analysis.explanation import explain
from simplernn_jax.analysis.export import to_numbers
from simplernn_jax.analysis.gallery import draw_pictures
from simplernn_jax.analysis.html_parts import shaded_text
from simplernn_jax.analysis.memory import half_gone
from simplernn_jax.analysis.page import make_page
from simplernn_jax.analysis.summary import summarize
from simplernn_jax.data.tokenizer import ByteTokenizer
from simplernn_jax.errors import UserError
from simplernn_jax.models import LanguageModel

TEXT = "Für $x_1$ <b>&amp;\n\tund 漢字, 😀! " * 2
CONFIG = small_config("residual", num_heads=2)


@functools.cache
def explanation():
    model = LanguageModel(CONFIG.model, rngs=nnx.Rngs(0))
    return explain(model, ByteTokenizer(), CONFIG, TEXT, token=60, map_tokens=16)


@functools.cache
def pictures():
    return draw_pictures(explanation())


@functools.cache
def explanation_of(mixer):
    """The same of a model with this mixer."""
    layers = mixer.count(",") + 1
    config = small_config(
        "residual", num_heads=2, num_layers=layers, mixer=mixer, attention_context=11
    )
    model = LanguageModel(config.model, rngs=nnx.Rngs(0))
    return explain(model, ByteTokenizer(), config, TEXT, token=60, map_tokens=16)


class Tags(html.parser.HTMLParser):
    """Which tags there are, and what their attributes refer to."""

    def __init__(self, page):
        super().__init__()
        self.names, self.references, self.text = set(), [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.names.add(tag)
        self.references += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_account_is_exact_and_covers_the_token():
    result = explanation()
    assert (result.start, result.stop) == (46, 62)
    (account,) = result.accounts
    assert account.operator_error < 1e-6
    assert account.layer_error < 1e-6
    ids = [256, *TEXT.encode("utf-8")]
    assert list(result.tokens) == ids
    assert result.chosen.position == 60
    assert result.chosen.predicted.text == bytes(ids[60:61]).decode()
    assert result.units[-1].stop == 16
    assert result.chosen.units[-1].stop == 14
    given = result.chosen.by_layer[0]
    assert given.tokens.sum() + given.state == pytest.approx(1, abs=1e-5)
    assert result.memory.positions[-1] == len(ids)
    assert result.state_value.evaluated == "the given text: 78 of its 78 predictions"
    assert list(result.state_value.by_reset) == [0, 4, 7, 16, 64]


def test_the_token_that_gains_most_from_the_far_past_is_chosen(monkeypatch):
    def losses_with(model, tokens, chosen, context):
        assert list(chosen) == list(range(33, 40))
        return np.linspace(3, 2, 7) if context == 32 else np.full(7, 4.0)

    monkeypatch.setattr(context_gain, "short_context_losses", losses_with)
    losses = np.full(39, 2.0)
    losses[36] = 0.5  # token 37 gains 2.33 - 0.5
    means, gains = context_gains(None, np.zeros(40, np.int32), losses)
    full = losses[32:].mean()
    assert means == (7, pytest.approx(4 - full), pytest.approx(2.5 - full))
    token, reason = choose_token(gains, 40)
    assert token == 37
    assert reason.startswith("what stands more than 32 tokens before it lowers its loss by 1.83")
    assert context_gains(None, np.zeros(33, np.int32), losses[:32]) == (None, {})
    token, reason = choose_token({}, 33)
    assert (token, reason[:12]) == (32, "the last one")


def with_gain(everything, far):
    gain = context_gain.ContextGain(1000, everything, far)
    return dataclasses.replace(explanation(), context_gain=gain)


def test_the_page_opens_with_a_summary_in_numbers():
    lives = np.concatenate([layer.half_lives.ravel() for layer in explanation().memory.layers])
    text = " ".join(summarize(with_gain(2.0, 0.13)))
    per_token = len(TEXT) / len(TEXT.encode())
    half = np.mean(np.exp2(-half_gone(lives) / lives))
    assert half == pytest.approx(0.5)
    assert f"gone after {half_gone(lives) * per_token:.2g} characters (" in text
    assert f"only after {lives.max() * per_token:,.0f} characters ({lives.max():,.0f} token" in text
    assert (
        "6.5% of what its predictions gain from reading back comes from text more than 25" in text
    )
    assert "measured on the last 1,000 predictions of this text" in text
    page = make_page(explanation(), pictures(), {})
    assert (
        page.index("In short") < page.index("<h2>1. The memory") < page.index("<h2>4. What every")
    )


@pytest.mark.parametrize(
    ("everything", "far", "expected"),
    [(1.0, -0.1, "does not help"), (0.0, 0.0, "does not improve the predictions at all")],
)
def test_the_summary_says_when_the_past_does_not_help(everything, far, expected):
    assert expected in summarize(with_gain(everything, far))[2]


def test_the_summary_of_attention_says_how_far_it_sees():
    sentences = summarize(explanation_of("attention"))
    assert sentences[0].startswith(
        "Its layer of attention sees the last 8.7 characters (11 tokens)"
    )
    assert len(sentences) == 3


def test_a_weak_contribution_looks_weak():
    units = explanation().chosen.units
    values = np.full(len(units), 0.01)
    page = shaded_text(units, values, 0.5, units[0], "rest")
    opacities = [float(part.split(")")[0]) for part in page.split("var(--red),")[1:]]
    assert opacities == pytest.approx([0.014] * len(units))


@functools.cache
def explanation_of_words():
    """Of a text with words, and the lines about the progress."""
    lines = []
    text = "The quick brown fox jumps over the lazy dog and runs"
    model = LanguageModel(CONFIG.model, rngs=nnx.Rngs(0))
    options = {"token": 38, "map_tokens": 24, "report": lines.append}
    return explain(model, ByteTokenizer(), CONFIG, text, **options), lines


def test_a_quotation_begins_and_ends_with_a_word():
    chosen = explanation_of_words()[0].chosen
    assert "".join(unit.text for unit in chosen.units) == "fox jumps over the la"
    assert (chosen.predicted.text, chosen.rest) == ("z", "y")


def test_progress_has_a_line_per_stage():
    _, lines = explanation_of_words()
    assert "taking 1 layer apart ..." in lines
    assert len(lines) >= 6
    assert all(line.endswith(" ...") for line in lines)


def test_progress_of_a_long_stage_is_a_share(monkeypatch):
    lines = []
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    advance = progress.begin_stage(lines.append, "reading", 40)
    advance(10)
    assert lines == ["reading ...", "reading: 25%"]


@pytest.mark.parametrize("token", [0, -1, 70])
def test_a_token_that_is_not_there_is_refused(token):
    with pytest.raises(UserError, match=rf"token {token}: the text has 69 tokens; name one of 1"):
        explain(None, ByteTokenizer(), CONFIG, "x" * 69, token=token)


def test_an_empty_text_is_refused():
    with pytest.raises(UserError, match="the text is empty"):
        explain(None, ByteTokenizer(), CONFIG, "")


def test_pictures_are_png_and_say_how_to_read_them():
    assert list(pictures()) == [
        *("map_layer_1", "state_share", "half_lives", "state_norm", "state_rank"),
        *("loss_by_position", "loss_by_reset", "contributions"),
    ]
    for picture in pictures().values():
        assert picture.png.startswith(b"\x89PNG\r\n")
        assert picture.how_to_read.endswith(".")


def test_the_page_needs_nothing_else():
    result = explanation()
    tags = Tags(make_page(result, pictures(), {"model": "<small>"}))
    assert "script" not in tags.names
    assert "small" not in tags.names  # what stands in a text or a fact is no markup
    assert "<small>" in tags.text
    assert len(tags.references) == len(pictures())
    assert all(value.startswith("data:image/png;base64,") for value in tags.references)
    assert f"layer 1{result.accounts[0].operator_error:.1e}" in tags.text
    assert "ttention keeps" not in tags.text


def test_layers_of_attention_have_maps_and_the_page_says_which_they_are():
    result = explanation_of("simple_rnn,attention")
    drawn = draw_pictures(result)
    assert list(drawn) == ["map_layer_1", "map_layer_2", *list(pictures())[1:]]
    assert drawn["map_layer_2"].title == "Attention map of layer 2 (attention)"
    text = Tags(make_page(result, drawn, {})).text
    for name, account in zip(["layer 1", "layer 2 (attention)"], result.accounts, strict=True):
        assert f"{name}{account.operator_error:.1e}{account.layer_error:.1e}" in text
        assert max(account.operator_error, account.layer_error) < 1e-6
    assert "a state that fills up; its layers are left out here." in text
    recurrence, attention = to_numbers(result)["layers"]
    assert (recurrence["mixer"], attention["mixer"]) == ("simple_rnn", "attention")
    assert recurrence.keys() - attention.keys() == {
        *("half_lives", "state_norm", "state_effective_rank")
    }


def test_a_model_without_any_recurrence_has_no_pictures_of_a_state():
    result = explanation_of("attention")
    drawn = draw_pictures(result)
    assert list(drawn) == [
        *("map_layer_1", "state_share", "loss_by_position", "loss_by_reset", "contributions")
    ]
    text = Tags(make_page(result, drawn, {})).text
    assert "it has neither half-lives nor a state that fills up." in text
    assert "A recurrence has" not in text


def test_one_is_singular():
    model = LanguageModel(CONFIG.model, rngs=nnx.Rngs(0))
    result = explain(model, ByteTokenizer(), CONFIG, "x")
    assert result.state_value.evaluated == "the given text: 1 of its 1 prediction"
    assert "1 token and BOS" in make_page(result, draw_pictures(result), {})


def test_numbers_are_json_and_reproduce_an_output():
    numbers = json.loads(json.dumps(to_numbers(explanation()), allow_nan=False))
    assert numbers["tokens"] == list(explanation().tokens)
    account = explanation().accounts[0]
    head = numbers["layers"][0]["map"][1]
    assert [len(row) for row in head] == list(range(1, 17))
    exact = np.asarray(account.weights)[0, 1]
    largest = np.abs(exact).max()
    for row, weights in zip(head, exact, strict=True):
        np.testing.assert_allclose(row, weights[: len(row)], atol=0.6e-3 * largest)
        assert all(len(f"{weight:.9g}".lstrip("-0.")) <= 4 for weight in row)
    values = np.asarray(account.values)[0, :, 1]
    rebuilt = np.array([row @ values[: len(row)] for row in map(np.asarray, head)])
    expected = (account.output - account.from_state)[0, :, 1]
    np.testing.assert_allclose(rebuilt, expected, atol=2e-3 * np.abs(expected).max())
    assert numbers["context_gain"]["predictions"] == 46
    assert [loss["reset_every"] for loss in numbers["loss_by_reset"]] == [0, 4, 7, 16, 64]
