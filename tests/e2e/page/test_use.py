"""The page in a browser, before a server whose stages compute, die and come back."""

import os
import re
import signal
import time

import pytest

from tests.e2e.page.driving import (
    ANSWER,
    IN_BROWSER,
    STORY,
    answered,
    ready,
    said,
    say,
    shoot,
    until,
)

pytestmark = IN_BROWSER
PHONE = {"width": 390, "height": 844}

# The worst contrast of any text that is shown with what is behind it. Source: WCAG 2.2, 1.4.3.
WORST_CONTRAST = """() => {
  const channels = (colour) => {
    const context = document.createElement("canvas").getContext("2d");
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => {
    const straight = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const linear = [r, g, b].map((value) => straight(value / 255));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const found = channels(getComputedStyle(node).backgroundColor);
      if (found[3] === 255) return found;
    }
    return [255, 255, 255];
  };
  const worst = { ratio: 21, text: "" };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode()); ) {
    const parent = node.parentElement;
    if (!node.data.trim() || !parent.checkVisibility() || parent.closest(".unseen")) continue;
    const pair = [light(channels(getComputedStyle(parent).color)), light(behind(parent))];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (ratio < worst.ratio) Object.assign(worst, { ratio, text: node.data.trim().slice(0, 60) });
  }
  return worst;
}"""


def test_a_chat_streams_and_goes_on_from_what_was_said(visit, server):
    page = ready(visit(server))
    say(page, STORY, max_tokens=60, temperature=0)
    said(page, 20)
    early = page.inner_text(f"{ANSWER} .said")
    text = answered(page)
    assert len(text) > len(early)
    assert text.startswith(early[:20])
    note = page.inner_text(f"{ANSWER} .note")
    assert re.search(r"60 tokens · first after .* · [\d.]+ tokens/s · ended by its length", note)
    asked = []
    page.on("request", lambda request: asked.append(request.post_data_json))
    say(page, "And then?")
    answered(page)
    (body,) = [each for each in asked if each]
    assert [each["role"] for each in body["messages"]] == ["user", "assistant", "user"]
    assert body["messages"][1]["content"].startswith(early[:20])
    assert body["max_tokens"] == 60


def test_options_are_sent_as_they_are_set(visit, server):
    page = ready(visit(server))
    asked = []
    page.on("request", lambda request: asked.append((request.url, request.post_data_json)))
    fields = {"system": "Be brief.", "top_p": 0.9, "top_k": 40, "seed": 7, "max_tokens": 4}
    say(page, "Hi", **fields, stop_strings="END\nSTOP")
    answered(page)
    ((url, body),) = [each for each in asked if each[1]]
    assert url.endswith("/v1/chat/completions")
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {name: body[name] for name in ("top_p", "top_k", "seed")} == {
        "top_p": 0.9, "top_k": 40, "seed": 7,
    }  # fmt: skip
    assert body["stop"] == ["END", "STOP"]
    asked.clear()
    page.click("#options summary")
    page.check("[name=mode][value=text]")
    say(page, "Once upon a")
    answered(page)
    ((url, body),) = [each for each in asked if each[1]]
    assert (url.rpartition("/v1/")[2], body["prompt"]) == ("completions", "Once upon a")
    page.fill("[name=top_p]", "3")  # of what cannot be, nothing is sent
    asked.clear()
    say(page, "more")
    assert page.evaluate("document.activeElement.name") == "top_p"
    assert not [each for each in asked if each[1]]


def test_a_stopped_answer_stops_in_the_stages_too(visit, server):
    page = ready(visit(server))
    say(page, STORY, temperature=0)
    said(page, 40)
    assert server.num_running() == 1
    page.click("#stop")
    text = answered(page)
    assert "stopped" in page.inner_text(f"{ANSWER} .note")
    server.wait_for(lambda: server.num_running() == 0, 5)
    assert page.inner_text(f"{ANSWER} .said") == text
    assert page.evaluate("document.activeElement.id") == "prompt"


def test_an_answer_goes_on_when_a_stage_is_killed_in_mid_sentence(visit, server):
    page = ready(visit(server))
    say(page, STORY, temperature=0, max_tokens=150)
    undisturbed = answered(page)
    page.click("#new-chat")
    say(page, STORY)
    said(page, 200)
    os.kill(server.workers()[1], signal.SIGKILL)
    page.wait_for_selector("#events [data-kind=failover]")
    event = page.inner_text("#events [data-kind=failover]")
    assert re.search(r"Stage 1 was lost and is back: [\d.]+ s", event)
    page.wait_for_selector("#plot .lost[d^=M]", state="attached")
    time.sleep(3)
    shoot(page, "killed")
    assert answered(page) == undisturbed


VIEW = (
    "{is_ready: %s, engine: {num_failovers: %d, num_running: %d, recovery_seconds: 6}, "
    "replicas: [{replica: 0}], stages: %s}"
)


def stages(*each, replica=0):
    parts = [
        f"{{replica: {replica}, stage_idx: {i}, state: '{state}', handshake_age_seconds: {age}}}"
        for i, (state, age) in enumerate(each)
    ]
    return f"[{', '.join(parts)}]"


def of_two(view):
    """The same of two pipelines; only one of them has stages that are told of."""
    return view.replace("[{replica: 0}]", "[{replica: 0}, {replica: 1}]")


WHOLE = VIEW % ("true", 0, 2, stages(("ready", 90), ("ready", 90), ("ready", 90)))


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ("null", WHOLE, ["All stages are there."]),
        (WHOLE, WHOLE, []),
        (
            WHOLE,  # one is gone, and the others go back to where it was
            VIEW
            % ("false", 0, 2, stages(("connecting", 91), ("down", "null"), ("connecting", 91))),
            ["Stage 1 is away; answers wait."],
        ),
        (
            WHOLE,
            VIEW
            % ("false", 0, 2, stages(("connecting", 91), ("connecting", 0.2), ("down", "null"))),
            ["Stages 1, 2 are away; answers wait."],
        ),
        (
            WHOLE,
            VIEW % ("true", 1, 2, stages(("ready", 91), ("ready", 5), ("ready", 91))),
            ["Stage 1 was lost and is back: 6.00 s; 2 answers went on."],
        ),
        (
            of_two(VIEW % ("true", 0, 2, stages(("ready", 90), replica=1))),
            of_two(VIEW % ("true", 1, 2, stages(("ready", 5), replica=1))),
            ["Stage 0 of replica 1 was lost and is back: 6.00 s; 2 answers went on."],
        ),
        (
            WHOLE,
            VIEW % ("true", 1, 0, stages(("ready", 91), ("ready", 91), ("ready", 91))),
            ["A connection was lost and is back: 6.00 s."],
        ),
    ],
)
def test_what_happened_is_told_of_those_it_happened_to(visit, server, before, now, told):
    found = visit(server).evaluate(
        f"""async () => {{
          const {{ changes }} = await import("/page/figures.js");
          return changes({before}, {now}, 1).map(({{ text }}) => text);
        }}"""
    )
    assert found == told


def test_the_picture_shows_what_the_server_tells(visit, server):
    page = ready(visit(server))
    say(page, STORY, max_tokens=100)
    until(page, "Number(document.getElementById('rate').textContent) > 0")
    until(page, "/[\\d.]+ ms/.test(document.querySelector('.split .value').textContent)")
    shoot(page, "desktop")
    told = server.pipeline()
    for stage in told["stages"]:
        card = page.inner_text(f"[data-stage='{stage['stage_idx']}']")
        layers = f"layers {stage['layer_start']}–{stage['layer_end'] - 1}"
        for words in (
            layers,
            "int8",
            stage["kernels"],
            f"at {stage['address']}",
            "ready",
            "Development evidence",
            "KV cache",
        ):
            assert words in card
        assert re.search(r"compute [\d.]+\s+crypto [\d.]+\s+wire [\d.]+", card)
        assert re.search(r"[\d.]+ kB/s · [\d.]+ [kMG]B in all", card)
    page.click("[data-stage='0'] summary")
    assert "whoever runs the machine can read along" in page.inner_text("[data-stage='0']")
    answered(page)


SHOW_TWO = """async () => {
  const { Picture } = await import("/page/stages.js");
  const view = await (await fetch("/pipeline")).json();
  const other = (each) => ({ ...each, replica: 1 });
  view.replicas.push({ ...other(view.replicas[0]), state: "draining", num_running: 3 });
  view.stages.push(...view.stages.map((stage) => ({ ...other(stage), address: "tcp:10.0.0.9:1" })));
  new Picture().show(view);
  const shown = document.querySelectorAll("#flow > .card[data-stage], #flow > .head");
  return [...shown].map((each) => each.innerText);
}"""


def test_stages_of_several_pipelines_stand_below_their_own(visit, server):
    found = ready(visit(server)).evaluate(SHOW_TWO)
    names = ["Replica 0", "Stage 0", "Stage 1", "Replica 1", "Stage 0", "Stage 1"]
    assert [text.splitlines()[0] for text in found] == names
    assert "draining" in found[3]
    assert "running 3" in found[3]
    assert ["at tcp:10.0.0.9:1" in text for text in found] == [False] * 4 + [True] * 2


def test_a_phone_shows_one_thing_at_a_time_and_nothing_is_cut_off(visit, server):
    page = ready(visit(server, viewport=PHONE, has_touch=True, color_scheme="dark"))
    page.fill("#prompt", STORY)
    page.tap("#send")
    said(page, 100)
    shoot(page, "phone-chat")
    page.tap("#stop")
    assert not page.is_visible("#pipeline")
    page.tap("button.tab[data-view=pipeline]")
    assert page.is_visible("#pipeline")
    assert not page.is_visible("#chat")
    shoot(page, "phone-pipeline")
    for width in (320, 390, 1000):
        page.set_viewport_size({"width": width, "height": 700})
        for view in ("chat", "pipeline"):
            if width < 1000:
                page.tap(f"button.tab[data-view={view}]")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("document.documentElement.scrollHeight") <= 700
    box = page.locator("#send").bounding_box()
    assert box["y"] + box["height"] <= 700


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read_in_light_and_in_dark(visit, server, scheme):
    page = ready(visit(server, color_scheme=scheme))
    say(page, "Write `code` and a list.", max_tokens=20)
    answered(page)
    page.click("#options summary")
    page.click("[data-stage='0'] summary")
    worst = page.evaluate(WORST_CONTRAST)
    assert worst["ratio"] >= 4.5, worst
    shoot(page, scheme)
    background = "getComputedStyle(document.body).backgroundColor"
    as_system = page.evaluate(background)
    page.click("#theme")  # light
    light = page.evaluate(background)
    page.click("#theme")  # dark
    assert page.evaluate(background) != light
    page.reload()
    assert page.evaluate(background) != light  # it is remembered
    assert as_system == (light if scheme == "light" else page.evaluate(background))
    assert page.evaluate(WORST_CONTRAST)["ratio"] >= 4.5


def test_a_keyboard_is_enough(visit, server):
    page = ready(visit(server))
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("Count")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("to a hundred.")
    page.keyboard.press("Enter")
    said(page, 20)
    assert page.inner_text("article[data-role=user] .said") == "Count\nto a hundred."
    page.keyboard.press("Escape")
    answered(page)
    page.keyboard.press("ArrowUp")
    assert page.input_value("#prompt") == "Count\nto a hundred."
    page.evaluate("document.activeElement.blur()")
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate("""() => {
              const at = document.activeElement;
              const style = getComputedStyle(at);
              const name = at.id || at.textContent.trim();
              return [at === document.body ? "BODY" : name, style.outlineStyle !== "none"];
            }""")
        )
    names = {name for name, _ in seen}
    assert {"prompt", "send", "theme", "new-chat", "log", "Copy", "Try again"} <= names
    assert any("Prompt and sampling" in name for name in names)
    assert sum("Development evidence" in name for name in names) >= 1
    assert not [name for name, is_outlined in seen if name != "BODY" and not is_outlined]
    page.keyboard.press("Control+Home")
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    page.keyboard.type("here")
    assert page.input_value("#prompt").endswith("here")
