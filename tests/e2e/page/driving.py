"""What a person does in the page, and sees there."""

import os
import shutil
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / "models/smollm2"
SHOTS = ROOT / "build/page"
IN_BROWSER = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("playwright") is None, reason="no veilpipe[browser] here"),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: scripts/test_page.sh has one"),
    pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="no SmolLM2 here"),
]
STORY = "Tell me a story about a lighthouse keeper and her dog."
ANSWER = "article[data-role=assistant]:last-of-type"


def until(page, expression, seconds=60):
    """As Playwright's wait_for_function, whose way of asking the page's policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(50)


def said(page, num_chars):
    """Wait until so much of the answer is there."""
    until(page, f"document.querySelector('{ANSWER} .said')?.textContent.length > {num_chars}")


def ready(page):
    page.wait_for_selector("#state[data-state=ready]")
    page.wait_for_selector("#flow .card[data-stage]", state="attached")
    return page


def say(page, text, **fields):
    """Send something by the keyboard, with these options."""
    if fields:
        page.evaluate("document.getElementById('options').open = true")
        for name, value in fields.items():
            page.fill(f"[name={name}]", str(value))
        page.evaluate("document.getElementById('options').open = false")
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def answered(page):
    """The text of the answer, once it has ended."""
    page.wait_for_selector(f"{ANSWER}[data-state=ended]")
    return page.inner_text(f"{ANSWER} .said")


def shoot(page, name):
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png")
