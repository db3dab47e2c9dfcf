"""The page of scripts/serve.py in a browser."""

import json

import pytest
from browser import launched, opened

pytestmark = pytest.mark.oldest_python


@pytest.fixture(scope="module")
def browser(server):
    with launched() as browser:
        yield browser


@pytest.fixture
def page(browser, server):
    with opened(browser, server.url) as page:
        yield page


def generate(page, prompt, **settings):
    """Generate in text mode; return the new text."""
    page.get_by_role("tab", name="Text").click()
    if not page.get_by_label("Temperature").is_visible():
        page.get_by_text("Settings").click()
    for label, value in {"New tokens": 30, "Seed": 1, **settings}.items():
        page.get_by_label(label).fill(str(value))
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Generate").click()
    page.locator("#generate:enabled").wait_for()
    return "".join(page.locator("#text .token").all_text_contents())


def test_generate_and_show_alternatives(page, server):
    text = generate(page, "ab")
    body = server.complete("ab", max_tokens=30, seed=1, temperature=0.8)
    assert text == body["choices"][0]["text"]
    page.locator("#text .token").nth(2).hover()
    assert page.locator("#alternatives tr").count() in (5, 6)
    assert page.locator("#alternatives").is_visible()
    page.locator("#text").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".token.current").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("#alternatives").is_hidden()


def test_a_new_conversation_has_nothing_of_the_answer_before(page):
    page.get_by_text("Settings").click()
    page.get_by_label("New tokens").fill("100000")
    page.get_by_label("Message").fill("hi")
    page.get_by_role("button", name="Send").click()
    page.locator(".message.assistant").wait_for(state="attached")
    page.get_by_role("button", name="New conversation").click()
    page.locator("#generate:enabled").wait_for()
    assert page.locator("#error").is_hidden()
    assert page.locator(".message").count() == 0
    assert page.evaluate("messages.length") == 0


def test_chat(page):
    page.get_by_text("Settings").click()
    page.get_by_label("New tokens").fill("20")
    for count, question in enumerate(("hi", "more"), 1):
        page.get_by_label("Message").fill(question[0])
        page.get_by_label("Message").press("Shift+Enter")
        page.get_by_label("Message").press_sequentially(question[1:])
        page.get_by_label("Message").press("Enter")
        page.locator(".message.assistant").nth(count - 1).wait_for()
        page.locator("#generate:enabled").wait_for()
    said = page.locator(".message").all_text_contents()
    assert (len(said), said[0], said[2]) == (4, "h\ni", "m\nore")
    page.reload()
    page.locator(".message.assistant").nth(1).wait_for()
    assert page.locator(".message").all_text_contents() == said
    page.get_by_label("Message").fill(" ")
    page.get_by_role("button", name="Send").click()  # nothing is sent
    page.get_by_label("Message").fill(" \x01\n")
    page.get_by_role("button", name="Send").click()
    page.get_by_role("alert").get_by_text("control characters").wait_for()
    assert page.locator(".message").count() == 4
    assert page.get_by_label("Message").input_value() == "\x01"
    page.get_by_role("button", name="New conversation").click()
    page.reload()
    page.get_by_role("button", name="Send").wait_for()
    assert page.locator(".message").count() == 0
    page.get_by_role("tab", name="Text").click()
    assert page.get_by_label("Prompt").is_visible()


def test_versions_of_messages(page):
    page.get_by_text("Settings").click()
    page.get_by_label("New tokens").fill("9")
    said = page.locator(".message")

    def send(text):
        page.get_by_label("Message").fill(text)
        page.get_by_label("Message").press("Enter")
        page.locator("#generate:enabled").wait_for()
        return said.all_text_contents()

    send("one")
    first = send("two")
    page.get_by_role("button", name="Edit").first.press("Enter")
    assert page.get_by_label("Message").input_value() == "one"
    assert said.count() == 0
    page.get_by_label("Message").press("Escape")
    assert said.all_text_contents() == first
    page.get_by_role("button", name="Edit").nth(2).click()
    second = send("three")
    assert (second[:3], len(second)) == ([*first[:2], "three"], 4)
    page.get_by_role("button", name="Regenerate").last.click()
    page.locator("#generate:enabled").wait_for()
    assert page.get_by_text("2/2").count() == 2  # of the question and its answer
    page.get_by_role("button", name="Edit").last.click()
    assert send("said")[-1] == "said"
    page.reload()
    page.get_by_text("3/3").wait_for()
    page.get_by_role("button", name="Previous version").first.focus()
    page.keyboard.press("Enter")
    assert said.all_text_contents() == first
    page.keyboard.press("Enter")  # of the button that is there now
    assert said.all_text_contents() == [*second[:3], "said"]


def test_versions_of_texts(page):
    first, second = generate(page, "ab"), generate(page, "ba")
    assert page.locator("#text").text_content() == "ba" + second
    page.get_by_role("button", name="Previous version").press("Enter")
    assert page.locator("#text").text_content() == "ab" + first
    assert page.get_by_label("Prompt").input_value() == "ab"
    page.get_by_role("button", name="Edit").click()
    assert page.get_by_label("Prompt").input_value() == "ab" + first
    generate(page, "ab" + first[:5])
    assert page.get_by_text("3/3").is_visible()


MARKUP = "<script>document.title = 'bad'</script><img src=x onerror=\"document.title='bad'\">"


def test_markup_stays_text(page):
    logprobs = {
        "tokens": [MARKUP],
        "token_logprobs": [-1.0],
        "top_logprobs": [{MARKUP: -1.0}],
        "text_offset": [0],
    }
    choice = {"index": 0, "text": MARKUP, "logprobs": logprobs, "finish_reason": "stop"}
    frame = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    page.route("**/v1/completions", lambda route: route.fulfill(body=frame))
    assert generate(page, MARKUP) == MARKUP
    page.locator("#text .token").hover()
    assert MARKUP.replace('"', '\\"') in page.locator("#alternatives").text_content()
    chunk = {"choices": [{"delta": {"content": MARKUP}}]}
    frame = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=frame))
    page.get_by_role("tab", name="Chat").click()
    page.get_by_label("Message").fill(MARKUP)
    page.get_by_role("button", name="Send").click()
    page.locator(".message.assistant").get_by_text(MARKUP).wait_for()
    assert page.locator(".output script, .output img").count() == 0
    assert page.title() == page.locator("h1").text_content()


def test_a_narrow_dark_screen(browser, server):
    screen = {"viewport": {"width": 400, "height": 800}, "color_scheme": "dark"}
    with opened(browser, server.url, **screen) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert back != "rgb(255, 255, 255)"
