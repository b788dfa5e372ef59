"""The web page in headless Chromium, over a scripted service; and once over the demo model."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from hybrid_k2.engine.service_types import QueueFullError
from hybrid_k2.errors import EngineError
from hybrid_k2.experts.usage import ExpertUse
from hybrid_k2.protocol import Tokenizer
from hybrid_k2.server.backend import Served
from tests.server.browser import CONTRAST, NAMELESS, Go, Visit, eventually
from tests.server.processes import serving
from tests.server.scripted import Script, ScriptedService
from tests.server.test_chat import THOUGHT, WEATHER, one_by_one
from tests.server.test_web_modules import FRAGMENTS

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CALL = (
    "</think>I look.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city":"Rome"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
)


def test_a_chat(go: Go, service: ScriptedService, tokenizer: Tokenizer) -> None:
    service.scripts = [Script(one_by_one(tokenizer, THOUGHT)) for _ in range(2)]
    visit = go()
    visit.say("hello\nthere")
    reply = visit.page.get_by_role("article", name="Reply")
    reply.get_by_text("Hello! How are you?").wait_for()
    thinking = reply.get_by_text("I greet.")
    assert not thinking.is_visible()
    reply.get_by_text("Thought for").click()
    thinking.wait_for()
    usage = service.tickets[0].prompt_tokens
    reply.get_by_text(f"at 20.0 tokens/s · prompt {usage}, 2 from the cache").wait_for()
    assert visit.page.get_by_role("heading", name="hello").is_visible()
    assert service.requests[0].thinking
    assert service.requests[0].messages == [{"role": "user", "content": "hello\nthere"}]

    visit.page.reload()
    reply.get_by_text("Hello! How are you?").wait_for()
    visit.page.get_by_label("Thinking", exact=True).uncheck()
    visit.say("again")
    eventually(lambda: len(service.requests) == 2)
    assert not service.requests[1].thinking
    assert [message["role"] for message in service.requests[1].messages or ()] == ["user", "assistant", "user"]


def test_keys_of_the_keyboard(go: Go, service: ScriptedService, tokenizer: Tokenizer) -> None:
    service.scripts = [Script(one_by_one(tokenizer, THOUGHT))]
    page = go().page
    page.keyboard.press("Tab")  # the message field has the focus first
    page.get_by_label("Message", exact=True).focus()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    page.get_by_text("Hello! How are you?").wait_for()
    assert service.requests[0].messages == [{"role": "user", "content": "one\ntwo"}]
    page.keyboard.press("Enter")  # nothing to send
    assert page.get_by_role("article", name="You").count() == 1


def test_stop_and_regenerate(go: Go, service: ScriptedService, tokenizer: Tokenizer) -> None:
    gate = threading.Event()
    service.scripts = [Script(one_by_one(tokenizer, "</think>one two three four five six<|im_end|>"), gate=gate)]
    visit = go()
    visit.say("count")
    visit.page.get_by_role("button", name="Stop").wait_for()
    reply = visit.page.get_by_role("article", name="Reply")
    for _ in one_by_one(tokenizer, "</think>one two three"):  # and no more, so that it cannot come to its end
        gate.set()
        eventually(lambda: not gate.is_set())
    reply.get_by_text("one two").wait_for()
    assert reply.get_attribute("aria-busy") == "true"
    visit.page.keyboard.press("Escape")
    reply.get_by_text("Stopped.").wait_for()
    eventually(service.tickets[0].cancelled.is_set)
    assert "six" not in (reply.text_content() or "")
    service.scripts = [Script(one_by_one(tokenizer, THOUGHT))]
    reply.get_by_role("button", name="Regenerate").click()
    reply.get_by_text("Hello! How are you?").wait_for()
    assert reply.count() == 1
    assert service.requests[1].messages == [{"role": "user", "content": "count"}]


def test_a_reply_goes_on_while_another_chat_is_shown(go: Go, service: ScriptedService, tokenizer: Tokenizer) -> None:
    gate = threading.Event()
    service.scripts = [Script(one_by_one(tokenizer, THOUGHT), gate=gate), Script(one_by_one(tokenizer, THOUGHT))]
    visit = go()
    visit.say("slow")
    eventually(lambda: len(service.requests) == 1)
    visit.page.get_by_role("button", name="New chat").click()
    visit.say("quick")
    visit.page.get_by_text("Hello! How are you?").wait_for()
    visit.page.get_by_role("link", name="slow").click()
    visit.page.get_by_text("Hello! How are you?").wait_for(state="hidden")
    while not visit.page.get_by_text("tokens at").is_visible():  # the end is a step, too
        gate.set()
    assert visit.page.get_by_text("Hello! How are you?").is_visible()


def test_settings_go_with_the_request(go: Go, service: ScriptedService, tokenizer: Tokenizer) -> None:
    service.scripts = [Script(one_by_one(tokenizer, THOUGHT))]
    visit = go()
    page = visit.page
    page.get_by_role("button", name="Settings").click()
    fields = {"System prompt": "be kind", "Temperature": "0.5", "Top p": "0.9", "Max tokens": "77"}
    for label, value in fields.items():
        page.get_by_label(label).fill(value)
    page.get_by_label("Tools", exact=True).fill("{")
    page.get_by_text("Expected a JSON list.").wait_for()
    page.get_by_label("Tools", exact=True).fill("")
    page.reload()
    page.get_by_role("button", name="Settings").click()
    assert {label: page.get_by_label(label).input_value() for label in fields} == fields
    page.get_by_role("button", name="Done").click()
    visit.say("hello")
    page.get_by_text("Hello! How are you?").wait_for()
    (request,) = service.requests
    params = request.params
    assert (params.temperature, params.top_p, params.max_tokens) == (0.5, 0.9, 77)
    assert (request.messages or [])[0] == {"role": "system", "content": "be kind"}


def test_errors_are_told_in_the_server_s_words(go: Go, service: ScriptedService, tokenizer: Tokenizer) -> None:
    service.scripts = [
        Script(refusal=QueueFullError("queue: it is full", retry_after_s=1, reason="queue")),
        Script(one_by_one(tokenizer, "</think>half")[:-1], error=EngineError("secret")),
        Script(one_by_one(tokenizer, THOUGHT)),
    ]
    visit = go()
    visit.say("hello")
    visit.page.get_by_role("alert").get_by_text("queue: it is full").wait_for()
    visit.page.get_by_role("button", name="Try again").click()
    visit.page.get_by_role("alert").get_by_text("the engine failed at this request").wait_for()
    visit.page.get_by_role("button", name="Try again").click()
    visit.page.get_by_text("Hello! How are you?").wait_for()
    assert [request.messages for request in service.requests] == [[{"role": "user", "content": "hello"}]] * 3
    visit.page.get_by_role("button", name="Settings").click()
    visit.page.get_by_label("Top p").fill("7")
    visit.page.keyboard.press("Escape")
    visit.say("more")
    visit.page.get_by_role("alert").get_by_text("top_p: ").wait_for()


def test_a_server_with_keys_asks_for_one(go: Go, service: ScriptedService, tokenizer: Tokenizer) -> None:
    service.scripts = [Script(one_by_one(tokenizer, THOUGHT))]
    visit = go(api_keys=("good-key",))
    page = visit.page
    for key in ("wrong", "good-key"):
        page.get_by_role("dialog").get_by_label("API key").fill(key)
        page.get_by_role("button", name="Use this key").click()
    page.get_by_text("k2", exact=True).wait_for()
    visit.say("hello")
    page.get_by_text("Hello! How are you?").wait_for()
    kept = page.evaluate("[JSON.stringify(localStorage), JSON.stringify(sessionStorage)]")
    assert ["good-key" in text for text in kept] == [False, True]
    page.reload()
    page.get_by_text("k2", exact=True).wait_for()
    assert page.get_by_role("dialog").count() == 0
    page.evaluate("sessionStorage.clear()")
    page.get_by_role("button", name="Regenerate").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    page.get_by_role("alert").get_by_text("API key: ").wait_for()


def test_a_tool_round_trip(go: Go, service: ScriptedService, tokenizer: Tokenizer) -> None:
    service.scripts = [Script(one_by_one(tokenizer, CALL)), Script(one_by_one(tokenizer, THOUGHT))]
    visit = go()
    page = visit.page
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Tools", exact=True).fill(json.dumps([WEATHER]))
    page.get_by_role("button", name="Done").click()
    visit.say("Weather in Rome?")
    call = page.get_by_label("Call of get_weather")
    call.get_by_text('"city": "Rome"').wait_for()
    page.get_by_label("Result of get_weather").fill('{"sky":"clear"}')
    page.get_by_role("button", name="Send result").click()
    page.get_by_text("Hello! How are you?").wait_for()
    call.get_by_text('"sky": "clear"').wait_for()
    assert page.get_by_role("button", name="Send result").count() == 0
    assert service.requests[1].tools == [WEATHER]
    *_, asked, result = service.requests[1].messages or ()
    assert asked["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city":"Rome"}'}
    assert (result["role"], result["tool_call_id"], result["content"]) == (
        "tool",
        asked["tool_calls"][0]["id"],
        '{"sky":"clear"}',
    )


def test_hostile_text_stays_text(go: Go, service: ScriptedService, tokenizer: Tokenizer) -> None:
    attack = (
        "<img src=x onerror=hacked=1><script>hacked=1</script><iframe src='javascript:parent.hacked=1'></iframe>\n\n"
        "[a](javascript:hacked=1) ![b](http://x.invalid/i.png) [c](https://x.invalid/)\n\n"
        "```html\n<b onclick=hacked=1>\n```\n\n| <i>x</i> |\n|---|\n| <svg onload=hacked=1> |"
    )
    service.scripts = [Script(one_by_one(tokenizer, f"{attack}</think>{attack}<|im_end|>"))]
    visit = go()
    visit.say(attack)
    visit.page.get_by_text("tokens at").wait_for()
    visit.page.locator(".thinking summary").click()
    found = visit.page.evaluate(
        """() => ({
          made: document.querySelectorAll("#messages :is(img, script, iframe, svg, b, i)").length,
          links: [...document.querySelectorAll("#messages a")].map((a) => [a.textContent, a.href, a.rel, a.target]),
          hacked: "hacked" in window,
        })"""
    )
    rel = "noopener noreferrer nofollow"
    assert found["made"] == 0
    assert found["links"] == [
        ["b", "http://x.invalid/i.png", rel, "_blank"],
        ["c", "https://x.invalid/", rel, "_blank"],
    ]
    assert not found["hacked"]
    text = visit.page.locator("#messages").inner_text()
    assert text.count("<script>hacked=1</script>") == 3
    assert text.count("[a](javascript:hacked=1)") == 3


def test_a_growing_text_looks_like_the_whole_one(go: Go) -> None:
    seed = random.randrange(2**32)
    choice = random.Random(seed)
    texts = ["".join(choice.choices(FRAGMENTS, k=40)) for _ in range(60)]
    wrong = go().page.evaluate(
        """async (texts) => {
          const { MarkdownView } = await import("/web/markdown_view.js");
          const wrong = [];
          for (const text of texts) {
            const whole = new MarkdownView(), growing = new MarkdownView();
            whole.update(text);
            for (let end = 1; end <= text.length; end += 1 + (end % 3)) growing.update(text.slice(0, end));
            growing.update(text);
            if (growing.element.innerHTML !== whole.element.innerHTML) wrong.push(text);
          }
          return wrong;
        }""",
        texts,
    )
    assert wrong == [], seed


def test_conversations_are_listed_renamed_and_deleted(go: Go, service: ScriptedService, tokenizer: Tokenizer) -> None:
    service.scripts = [Script(one_by_one(tokenizer, THOUGHT)) for _ in range(2)]
    visit = go()
    page = visit.page
    chats = page.get_by_role("navigation").get_by_role("listitem")
    for text in ("<b>first</b>", "second"):
        page.get_by_role("button", name="New chat").click()
        visit.say(text)
        page.get_by_text("tokens at").wait_for()
    assert [text.strip() for text in chats.all_inner_texts()] == ["second", "<b>first</b>"]
    chats.first.get_by_role("button", name="Rename").click()
    page.get_by_label("Title").fill("renamed")
    page.keyboard.press("Enter")
    page.get_by_role("link", name="renamed").wait_for()
    page.reload()
    page.get_by_role("link", name="renamed").wait_for()
    chats.first.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Cancel").click()
    assert chats.count() == 2
    chats.first.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    page.get_by_role("heading", name="<b>first</b>").wait_for()
    assert chats.count() == 1
    assert page.evaluate("Object.keys(localStorage).filter((key) => key.includes('chat')).length") == 1


def test_a_full_storage_is_told_and_the_chat_goes_on(go: Go, service: ScriptedService, tokenizer: Tokenizer) -> None:
    service.scripts = [Script(one_by_one(tokenizer, THOUGHT))]
    visit = go()
    visit.page.evaluate(
        """() => {
          for (let size = 1 << 22; size >= 1; size /= 2) {
            for (let number = 0; number < 4; number += 1) {
              try { localStorage.setItem(`junk-${size}-${number}`, "x".repeat(size)); } catch { break; }
            }
          }
        }"""
    )
    visit.say("hello")
    visit.page.get_by_text("Hello! How are you?").wait_for()
    visit.page.get_by_text("This browser has no room to keep the conversation").wait_for()


def test_the_loading_is_shown(go: Go, service: ScriptedService) -> None:
    visit = go(ready=False)
    visit.backend.report_loading(2**30, 4 * 2**30)
    visit.page.get_by_text("The model is loading: 25 %, 1.0 GiB of 4.0 GiB").wait_for()
    visit.backend.serve(Served(service, cast(Any, service)))
    visit.page.locator("#notice").wait_for(state="hidden")


def test_the_status_view(go: Go, service: ScriptedService) -> None:
    page = go().page
    page.get_by_role("link", name="Server status").click()
    page.get_by_text("3 of 12 pages in use").wait_for()
    assert page.locator("#pages").inner_text() == "25 %"
    table = page.get_by_label("Memory of host")
    for row in service.plan.rows:
        assert table.get_by_text(row.dtype).count() > 0
    assert table.get_by_role("row").count() == len(service.plan.rows) + 2
    told = page.locator("#heat-told")
    told.get_by_text("8 choices in 2 layers").wait_for()
    heat = page.get_by_role("img", name="Heat map of experts")
    heat.focus()
    page.keyboard.press("ArrowRight")
    told.get_by_text("Layer 1, expert 0: 75 % of the layer's choices (3), 2.3 times the even share").wait_for()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    told.get_by_text("Layer 2, expert 1: 50 % of the layer's choices (2), 1.5 times the even share, on the").wait_for()
    box = heat.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 5 / 6, box["y"] + box["height"] / 4)
    told.get_by_text("Layer 1, expert 2: 25 %").wait_for()
    service.uses = {1: ExpertUse([3, 4, 1], []), 2: ExpertUse([0, 2, 2], [1])}
    page.get_by_label("last 30 s").check()
    page.mouse.move(0, 0)
    told.get_by_text("4 choices in 2 layers").wait_for()
    page.go_back()
    page.get_by_text("What would you like to know?").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_legible_and_named(go: Go, service: ScriptedService, tokenizer: Tokenizer, scheme: str) -> None:
    text = "*a* `b`\n\n> q\n\n```c\nx\n```\n\n| h |\n|---|\n| [l](http://x.y) |"
    service.scripts = [
        Script(one_by_one(tokenizer, f"r</think>{text}<|im_end|>")),
        Script(refusal=QueueFullError("queue: it is full", retry_after_s=1, reason="queue")),
    ]
    visit = go({"color_scheme": scheme})
    page = visit.page
    visit.say("hello")
    page.get_by_text("tokens at").wait_for()
    page.get_by_text("Thought for").click()
    visit.say("more")
    page.get_by_role("alert").get_by_text("queue").wait_for()
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate(NAMELESS) == []
    page.get_by_role("button", name="Settings").click()
    assert page.evaluate(CONTRAST) == []
    page.keyboard.press("Escape")
    page.get_by_role("link", name="Server status").click()
    page.get_by_text("3 of 12 pages in use").wait_for()
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate(NAMELESS) == []


def test_dark_and_light_are_the_reader_s_choice(go: Go) -> None:
    page = go({"color_scheme": "dark"}).page
    colour = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(colour)
    page.get_by_role("button", name="Switch between dark and light").click()
    light = page.evaluate(colour)
    assert light != dark
    page.reload()
    assert page.evaluate(colour) == light
    page.get_by_role("button", name="Switch between dark and light").click()
    assert page.evaluate(colour) == dark


def test_a_narrow_screen(go: Go, service: ScriptedService, tokenizer: Tokenizer) -> None:
    text = f"```\n{'wide ' * 60}\n```\n\n| {'column | ' * 20}\n{'|---' * 20}|\n\n{'x' * 300}"
    service.scripts = [Script(one_by_one(tokenizer, f"</think>{text}<|im_end|>"))]
    visit = go({"viewport": {"width": 360, "height": 640}})
    page = visit.page
    wide = "document.documentElement.scrollWidth > 360 || document.getElementById('log').scrollWidth > 360"
    visit.say("y" * 200)
    page.get_by_text("tokens at").wait_for()
    assert not page.evaluate(wide)
    chats = page.get_by_role("navigation", name="Conversations")
    assert not chats.is_visible()
    page.get_by_role("button", name="Conversations").click()
    chats.get_by_role("link", name="Server status").click()
    page.get_by_text("3 of 12 pages in use").wait_for()
    assert not page.evaluate(wide)
    page.get_by_role("button", name="Conversations").click()
    page.keyboard.press("Escape")
    chats.wait_for(state="hidden")


def test_over_the_demo_model(browser: Browser, tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        server.wait_ready()
        visit = Visit(browser, server.url)
        visit.page.get_by_role("button", name="Settings").click()
        visit.page.get_by_label("Temperature").fill("0")
        visit.page.get_by_role("button", name="Done").click()
        visit.say("What is 17 + 25?")
        visit.page.get_by_text("tokens at").wait_for()
        assert "42" in visit.page.locator(".markdown").inner_text()
        visit.page.get_by_role("link", name="Server status").click()
        visit.until("Number(document.getElementById('tokens').textContent) > 5")
        visit.page.get_by_text("choices in 3 layers").wait_for()
        colours = visit.page.locator("#heat").evaluate(
            """(canvas) => {
              const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
              return new Set(new Uint32Array(data.buffer)).size;
            }"""
        )
        assert colours > 10
        visit.close()
