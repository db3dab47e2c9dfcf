"""From a text to the page: `explain`, its pictures, its HTML and its numbers."""

import dataclasses
import functools
import html.parser
import json

import numpy as np
import pytest
from flax import nnx
from small_runs import small_config

from simplernn_jax.analysis import explanation as explanation_module
from simplernn_jax.analysis.explanation import choose_token, explain
from simplernn_jax.analysis.export import to_numbers
from simplernn_jax.analysis.gallery import draw_pictures
from simplernn_jax.analysis.page import make_page
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


def with_layers(*layers):
    """The same of a model with these layers; None is one that is no SimpleRNN."""
    whole = explanation()

    def pick(values):
        return tuple(None if layer is None else values[layer] for layer in layers)

    return dataclasses.replace(
        whole,
        accounts=pick(whole.accounts),
        memory=whole.memory._replace(layers=pick(whole.memory.layers)),
        chosen=dataclasses.replace(whole.chosen, by_layer=pick(whole.chosen.by_layer)),
    )


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
    short = np.linspace(3, 2, 7)  # of tokens 33 to 39
    monkeypatch.setattr(explanation_module, "short_context_losses", lambda *arguments: short)
    losses = np.full(39, 2.0)
    losses[36] = 0.5  # token 37 gains 2.33 - 0.5
    token, reason = choose_token(None, np.zeros(40, np.int32), losses)
    assert token == 37
    assert reason.startswith("what stands more than 32 tokens before it lowers its loss by 1.83")
    token, reason = choose_token(None, np.zeros(33, np.int32), losses[:32])
    assert (token, reason[:12]) == (32, "the last one")


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


@pytest.mark.parametrize(
    ("layers", "left_out"), [((0, None), "SimpleRNN: layer 2 of 2."), ((0,), None)]
)
def test_the_page_needs_nothing_else_and_names_what_is_left_out(layers, left_out):
    result = with_layers(*layers)
    tags = Tags(make_page(result, pictures(), {"model": "<small>"}))
    assert "script" not in tags.names
    assert "small" not in tags.names  # what stands in a text or a fact is no markup
    assert "<small>" in tags.text
    assert len(tags.references) == len(pictures())
    assert all(value.startswith("data:image/png;base64,") for value in tags.references)
    assert f"layer 1{result.accounts[0].operator_error:.1e}" in tags.text
    assert ("Left out" in tags.text) == (left_out is not None)
    assert left_out is None or left_out in tags.text


def test_a_model_without_any_recurrence_still_has_its_losses():
    result = with_layers(None)
    drawn = draw_pictures(result)
    assert list(drawn) == ["loss_by_position", "loss_by_reset", "contributions"]
    assert "SimpleRNN: layer 1 of 1." in Tags(make_page(result, drawn, {})).text
    assert to_numbers(result)["layers"] == [None]


def test_numbers_are_json_and_reproduce_an_output():
    numbers = json.loads(json.dumps(to_numbers(explanation()), allow_nan=False))
    assert numbers["tokens"] == list(explanation().tokens)
    account = explanation().accounts[0]
    head = numbers["layers"][0]["map"][1]
    assert [len(row) for row in head] == list(range(1, 17))
    values = np.asarray(account.values)[0, :, 1]
    rebuilt = np.array([row @ values[: len(row)] for row in map(np.asarray, head)])
    expected = (account.output - account.from_state)[0, :, 1]
    np.testing.assert_allclose(rebuilt, expected, rtol=1e-4, atol=1e-5)
    assert [loss["reset_every"] for loss in numbers["loss_by_reset"]] == [0, 4, 7, 16, 64]
