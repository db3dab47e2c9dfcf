"""The exported page: its tokenizers and decoding in V8, and the page in a browser."""

import itertools
import json

import numpy as np
import pytest
import tokenizers
from browser import launched, opened
from hypothesis import example, given, settings
from hypothesis import strategies as st
from processes import run_scripts
from small_data import byte_level, pretrained, records, talk, word_level, write
from small_runs import MODELS, TOKENIZERS, small_config, trained

from benchmarks.stress.fuzz import TEXT, byte_level_json
from simplernn_jax import load_model
from simplernn_jax.errors import UserError
from simplernn_jax.export.exporting import export
from simplernn_jax.export.formats import find_format
from simplernn_jax.export.html import FILE, tokenizer_data
from simplernn_jax.inference import generate_text
from simplernn_jax.training.loop import train

pytestmark = pytest.mark.oldest_python

CHAT = {"steps": 150, "hidden_dim": 32, "sequence_length": 40, "learning_rate": 0.02}


def splitting_tokenizer():
    """BPE whose words are those of a pattern, as of larger models, and known as a whole."""
    content = json.loads(byte_level_json())
    content["model"]["ignore_merges"] = True
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    pattern = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
    words = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = words.Sequence(
        [
            words.Split(tokenizers.Regex(pattern), "isolated"),
            words.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


@pytest.fixture(scope="module", params=[*TOKENIZERS, "splitting"])
def pair(request, tmp_path_factory):
    """A tokenizer, and the exported page with it in V8."""
    folder = tmp_path_factory.mktemp("page")
    make = TOKENIZERS.get(request.param, lambda: pretrained(splitting_tokenizer()))
    tokenizer = make()
    find_format("html").write(trained(MODELS["parallel"], tokenizer), folder)
    return tokenizer, find_format("html").load(folder)


@settings(max_examples=60)
@given(st.text())
@example(TEXT)
@example(TEXT[::-1])
@example(TEXT[:1] * 300)
def test_any_text_is_encoded_alike(pair, text):
    tokenizer, page = pair
    try:
        ids = tokenizer.encode(text).tolist()
    except UserError:
        with pytest.raises(Exception, match="is not known to this model"):
            page.encode(text)
        return
    assert page.encode(text) == ids


BYTES = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = tokenizers.pre_tokenizers.Digits()
WORDS = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\w+"), "isolated")


def split_by(*parts):
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(list(parts))
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        word_level("a"),
        byte_level(tokenizers.normalizers.NFC()),
        byte_level(add_prefix_space=True),
        split_by(DIGITS, BYTES),
        split_by(WORDS, WORDS, BYTES),
    ],
)
def test_tokenizers_that_are_not_supported(tokenizer):
    tokenizer = pretrained(tokenizer)
    with pytest.raises(UserError, match="the tokenizer is not supported by this format"):
        tokenizer_data(tokenizer, tokenizer.vocab_size)


def test_samples_follow_the_probabilities(pair):
    _, page = pair
    call = """(() => {
      const logits = [Math.log(0.1), Math.log(0.2), Math.log(0.3), Math.log(0.4)];
      const shares = [0, 0, 0, 0];
      for (let i = 0; i < 40000; i++) shares[sample(logits, 0.5, [3])] += 1 / 40000;
      return [shares, sample(logits, 0, []), sample(logits, 0, [3]), likeliest(logits, 2)];
    })()"""
    shares, greedy, second, top = page._call(call)
    assert shares == pytest.approx([1 / 14, 4 / 14, 9 / 14, 0], abs=0.015)  # 6 sigma
    assert (greedy, second) == (3, 2)
    assert [number for number, _ in top] == [3, 2]
    assert [value for _, value in top] == pytest.approx([0.4, 0.3])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model with random parameters and its page."""
    original = trained(MODELS["parallel"], workdir="a <b> run")
    folder = tmp_path_factory.mktemp("page")
    find_format("html").write(original, folder)
    return original.model, original.tokenizer, folder / FILE


@pytest.fixture(scope="module")
def exported_chat(tmp_path_factory):
    """The workdir of a model that has learned two answers, and its page."""
    folder = tmp_path_factory.mktemp("chat")
    turns = itertools.product([("a", "yes"), ("bc", "no")], repeat=3)
    talks = [{"messages": talk(*three)} for three in turns]
    source = write(folder / "a.jsonl", records(*talks))
    config = small_config("parallel", source=str(source), template="roles", **CHAT)
    train(config, str(folder / "run"))
    model, tokenizer, config = load_model(str(folder / "run"))
    tokens = np.arange(70, dtype=np.int32)
    out = folder / "page"
    export("html", model, tokenizer, config, str(out), workdir=str(folder / "run"), tokens=tokens)
    return folder / "run", out / FILE


@pytest.fixture(scope="module")
def browser(exported, exported_chat):
    with launched() as browser:
        yield browser


@pytest.fixture
def page(browser, exported):
    with opened(browser, exported[2].as_uri()) as page:
        yield page


def written(page, prompt, tokens=200, temperature=0):
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Temperature").fill(str(temperature))
    page.get_by_label("New tokens").fill(str(tokens))
    page.get_by_role("button", name="Generate").click()
    page.locator("#generate:enabled").wait_for()
    return "".join(page.locator("#text .token").all_text_contents())


def test_greedy_text_is_that_of_the_model(page, exported):
    model, tokenizer, _ = exported
    prompt = "abé c"
    text = written(page, prompt)
    assert text == generate_text(model, tokenizer, prompt, max_new_tokens=200)[0]
    assert "tokens/s" in page.locator("#speed").text_content()
    assert page.title() == "a <b> run"
    page.locator("#text .token:visible").nth(3).hover()
    assert page.locator("#alternatives tr").count() == 6
    assert page.locator("#alternatives .chosen").count() == 1


@pytest.fixture
def chat_page(browser, exported_chat):
    with opened(browser, exported_chat[1].as_uri()) as page:
        yield page


def answered(page, message):
    """Send a message by Enter; return the answer."""
    page.get_by_label("Message").fill(message)
    page.get_by_label("Message").press("Enter")
    page.locator("#generate:enabled").wait_for()
    return page.locator("#conversation .message").last.text_content()


def test_chat_answers_as_in_the_terminal(chat_page, exported_chat):
    questions = ["a", "bc", "bc"]
    script = ("scripts/chat.py", "--workdir", exported_chat[0])
    ((code, output, _),) = run_scripts(script, stdin="\n".join(questions).encode())
    assert code == 0
    assert [answered(chat_page, question) for question in questions] == output.splitlines()
    assert output == "yes\nno\nno\n"
    said = ["a", "yes", "bc", "no", "bc", "no"]
    assert chat_page.locator(".message").all_text_contents() == said
    assert chat_page.locator("#speed").text_content().startswith("3 tokens")
    chat_page.locator(".token").first.hover()
    assert chat_page.locator("#alternatives tr").count() == 6
    chat_page.reload()
    chat_page.locator(".message").nth(5).wait_for()
    assert answered(chat_page, "a") == "yes"


def test_an_end_of_turn_of_several_tokens_is_not_shown(chat_page):
    chat_page.evaluate(
        """() => {
          const bytes = [..."hel<lo<end>more"].map((c) => c.charCodeAt(0));
          let position = -1;  // after BOS
          model.step = () => {
            const logits = new Float32Array(tokenizer.bytes.length).fill(-9);
            logits[bytes[Math.max(0, position)]] = 9;
            position += 1;
            return logits;
          };
          chat = { first: ["", ""], next: ["", ""], end_of_turn: "<end>", stop: "<end>" };
        }"""
    )
    assert answered(chat_page, "?") == "hel<lo"
    assert chat_page.evaluate("messages.map(({ content }) => content)") == ["?", "hel<lo"]


def test_a_stopped_answer_is_a_turn(chat_page):
    chat_page.evaluate(
        """() => {
          model.step = () => {
            for (const end = performance.now() + 1; performance.now() < end;);
            return new Float32Array(tokenizer.bytes.length).map((_, id) => -Math.abs(id - 97));
          };
        }"""
    )
    chat_page.get_by_label("Message").fill("?")
    chat_page.get_by_role("button", name="Send").click()
    chat_page.locator(".token").nth(9).wait_for()
    chat_page.get_by_role("button", name="Stop").click()
    chat_page.locator("#generate:enabled").wait_for()
    question, answer = chat_page.locator(".message").all_text_contents()
    assert question == "?"
    assert set(answer) == {"a"}
    contents = chat_page.evaluate("messages.map(({ content }) => content)")
    assert contents == [question, answer]
