"""A browser, and a server of SmolLM2 on two stages that it looks at."""

import os
import re

import pytest

from tests.e2e.conftest import Cluster
from tests.e2e.page.driving import CHROMIUM, MODEL

DESKTOP = {"width": 1440, "height": 800}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("page")
    environment = {**os.environ, "VEILPIPE_DEV_DIR": str(directory / "dev")}
    cluster = Cluster(directory, MODEL, environment)
    try:
        cluster.plan(2, precision="int8")
        yield cluster.serve("--supervise")
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens a page at a server's address; afterwards nothing may have gone wrong in it."""
    contexts, problems, elsewhere = [], [], []

    def start(server, expects=None, **options):
        context = browser.new_context(**{"viewport": DESKTOP, "color_scheme": "light"} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)

        def note(message):
            is_bad = message.type in {"error", "warning"}
            if is_bad and not (expects and expects in message.text):
                problems.append(message.text)

        page.on("console", note)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: elsewhere.append(request.url))
        page.goto(server.url)
        return page

    yield start
    for context in contexts:
        context.close()
    assert not problems
    assert all(re.match(r"http://127\.0\.0\.1:\d+/", url) for url in elsewhere)
