"""A browser for tests of pages, which are skipped without one."""

import contextlib
import shutil

import pytest


@contextlib.contextmanager
def launched():
    """A browser; its loop runs in this thread, where Orbax can then save no model."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no Chromium on the PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, url, **options):
    """The page at `url`, once it knows its model; it has no errors, and loads from there only."""
    page = browser.new_page(**{"viewport": {"width": 1000, "height": 900}} | options)
    problems, requests = [], []
    page.on("pageerror", lambda error: problems.append(error))  # noqa: PLW0108 - it sets attributes
    page.on("request", lambda request: requests.append(request.url))
    page.goto(url)
    page.locator("#facts:not(:text-is('…'))").wait_for()
    yield page
    assert not problems
    assert all(request.startswith((url, "data:")) for request in requests)
    page.close()
