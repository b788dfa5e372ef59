"""Images on the web page in headless Chromium: attached, sent, shown, kept, and what is refused."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from hybrid_k2.protocol import Image, ImageFormat, Tokenizer
from hybrid_k2.server.backend import Served
from tests.server.browser import CONTRAST, NAMELESS, Go, Visit, eventually
from tests.server.scripted import Script, ScriptedService
from tests.server.test_chat import THOUGHT, one_by_one

HOSTILE = "<img src=x onerror=hacked=1>.png"
LARGEST_BYTES, LARGEST_SIDE = 4 * 2**20, 4096
# A paste of files, and a drop: [{name, data (base64)}, ...], and the texts that come along.
TRANSFER = """const transfer = new DataTransfer();
  for (const { name, data } of files) {
    transfer.items.add(new File([Uint8Array.from(atob(data), (each) => each.charCodeAt(0))], name));
  }
  for (const [type, text] of texts) transfer.setData(type, text);
  const more = { bubbles: true, cancelable: true };"""
HOLD = """() => {
  const decode = createImageBitmap;
  window.createImageBitmap = async (blob) => {
    await new Promise((resolve) => { window.goOn = resolve; });
    delete window.goOn;
    return decode(blob);
  };
}"""
PASTE = f"""([files, texts]) => {{ {TRANSFER}
  document.getElementById("input").dispatchEvent(new ClipboardEvent("paste", {{ clipboardData: transfer, ...more }}));
}}"""
DROP = f"""([files, texts]) => {{ {TRANSFER}
  const log = document.getElementById("log");
  const drop = new DragEvent("drop", {{ dataTransfer: transfer, ...more }});
  log.dispatchEvent(drop);
  return drop.defaultPrevented;
}}"""


def noise(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(pixels: NDArray[np.uint8], kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, kind, lossless=True, quality=95)  # each format takes what it knows
    return file.getvalue()


def attach(visit: Visit, **files: bytes) -> None:
    """Choose files as with the button."""
    chosen: Any = [{"name": name, "mimeType": "", "buffer": data} for name, data in files.items()]
    visit.page.locator("#image-files").set_input_files(chosen)


def transfer(**files: bytes) -> list[dict[str, str]]:
    return [{"name": name, "data": base64.b64encode(data).decode()} for name, data in files.items()]


def sent(visit: Visit) -> list[Any]:
    """Return a list to which the messages of each request will be added."""
    bodies: list[Any] = []

    def look(request: Any) -> None:
        if request.url.endswith("/v1/chat/completions"):
            bodies.append(request.post_data_json["messages"])

    visit.page.on("request", look)
    return bodies


def data_of(part: Any) -> tuple[str, bytes]:
    """Return the type and the bytes of a part that holds an image."""
    assert part["type"] == "image_url"
    head, _, data = part["image_url"]["url"].partition(",")
    return head, base64.b64decode(data, validate=True)


@pytest.fixture
def seeing(service: ScriptedService) -> ScriptedService:
    service.images, service.context_tokens = ImageFormat(), 2**16
    return service


@pytest.fixture
def visit(go: Go, seeing: ScriptedService, tokenizer: Tokenizer) -> Visit:
    """A page of a server whose model reads images and has four replies."""
    seeing.scripts = [Script(one_by_one(tokenizer, THOUGHT)) for _ in range(4)]
    visit = go()
    visit.page.get_by_role("button", name="Attach images").wait_for()
    return visit


def test_images_are_attached_sent_shown_and_sent_again(visit: Visit, seeing: ScriptedService) -> None:
    page, bodies = visit.page, sent(visit)
    files = {
        "cat.png": encoded(noise(30, 20)),
        "dog.webp": encoded(noise(20, 30), "WEBP"),
        "other.gif": encoded(noise(5, 5), "GIF"),
    }
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Attach images").click()
    assert chooser.value.is_multiple()
    attach(visit, **files)
    attached = page.get_by_role("list", name="Images for the message")
    attached.get_by_role("img", name="other.gif").wait_for()
    attached.get_by_role("button", name="Remove “other.gif”").click()
    attached.get_by_role("img", name="other.gif").wait_for(state="detached")
    visit.say("what are these?")
    page.get_by_text("tokens at").wait_for()
    attached.wait_for(state="hidden")
    shown = page.get_by_role("article", name="You").get_by_role("img")
    visit.until(
        "[...document.querySelectorAll('.user img')].every(({ naturalWidth: width }) => [20, 30].includes(width))"
    )
    assert [each.get_attribute("alt") for each in shown.all()] == ["cat.png", "dog.webp"]
    ((message,),) = bodies
    *images, text = message["content"]
    assert [data_of(part) for part in images] == [
        ("data:image/png;base64", files["cat.png"]),
        ("data:image/webp;base64", files["dog.webp"]),
    ]
    assert text == {"type": "text", "text": "what are these?"}
    got = (seeing.requests[0].messages or [])[0]["content"]
    assert [part["type"] for part in got] == ["image", "image", "text"]
    for part, pixels in zip(got, (noise(30, 20), noise(20, 30)), strict=False):
        assert isinstance(part["image"], Image)
        assert (part["image"].pixels[: pixels.shape[0], : pixels.shape[1]] == pixels).all()

    page.reload()
    page.get_by_role("button", name="Regenerate").click()
    eventually(lambda: len(seeing.requests) == 2)
    page.get_by_text("tokens at").wait_for()
    visit.say("and now?")
    page.get_by_text("tokens at").nth(1).wait_for()
    assert bodies[1] == [message]
    assert [each["content"] for each in bodies[2] if each["role"] == "user"] == [message["content"], "and now?"]


def test_an_image_needs_no_text(visit: Visit) -> None:
    bodies = sent(visit)
    attach(visit, **{"cat.png": encoded(noise(30, 20))})
    visit.page.get_by_role("img", name="cat.png").wait_for()
    visit.page.get_by_role("button", name="Send").click()
    visit.page.get_by_text("tokens at").wait_for()
    visit.page.get_by_role("heading", name="cat.png").wait_for()
    ((message,),) = bodies
    assert [part["type"] for part in message["content"]] == ["image_url"]


def test_pasted_and_dropped_images(visit: Visit) -> None:
    page, bodies = visit.page, sent(visit)
    data = encoded(noise(12, 12))
    page.evaluate(PASTE, [transfer(**{"pasted.png": data}), [["text/html", "<img>"]]])
    page.get_by_role("img", name="pasted.png").wait_for()
    page.evaluate(PASTE, [transfer(**{"cells.png": data}), [["text/html", "<table>"], ["text/plain", "1"]]])  # a text
    assert page.evaluate(DROP, [transfer(**{"dropped.png": data, "second.png": data}), []])
    page.get_by_role("img", name="second.png").wait_for()
    assert not page.evaluate(DROP, [[], [["text/plain", "a text"]]])
    visit.say("hello")
    page.get_by_text("tokens at").wait_for()
    alts = [each.get_attribute("alt") for each in page.locator(".user img").all()]
    assert alts == ["pasted.png", "dropped.png", "second.png"]
    assert len(bodies[0][0]["content"]) == 4


def test_what_is_sent_waits_for_images_that_are_read(visit: Visit, seeing: ScriptedService) -> None:
    page, bodies = visit.page, sent(visit)
    page.evaluate(HOLD)
    attach(visit, **{"slow.png": encoded(noise(9, 9))})
    visit.until("'goOn' in window")
    page.evaluate(DROP, [transfer(**{"next.png": encoded(noise(9, 9))}), []])
    visit.say("quick")
    assert page.get_by_role("article").count() == 0
    page.evaluate("goOn()")
    visit.until("document.getElementById('attached').children.length === 1 && 'goOn' in window")  # one after the other
    page.evaluate("goOn()")
    page.get_by_text("tokens at").wait_for()
    assert [part["type"] for part in bodies[0][0]["content"]] == ["image_url", "image_url", "text"]
    assert [each.get_attribute("alt") for each in page.locator(".user img").all()] == ["slow.png", "next.png"]

    attach(visit, **{"slow.png": encoded(noise(9, 9)), "text.png": b"text"})
    visit.until("'goOn' in window")
    visit.say("not without text.png")
    page.evaluate("goOn()")
    page.get_by_text("text.png: expected a PNG, JPEG, WebP or GIF image.").wait_for()
    page.get_by_role("img", name="slow.png").last.wait_for()
    assert page.get_by_label("Message", exact=True).input_value() == "not without text.png"
    page.get_by_role("button", name="Send").click()  # told, it can be done
    page.get_by_text("tokens at").nth(1).wait_for()
    assert len(seeing.requests) == 2


def test_what_is_no_image_is_told_and_a_name_stays_text(visit: Visit) -> None:
    page = visit.page
    good = encoded(noise(40, 30))
    for name, data, why in (
        ("notes.png", b"just text", "expected a PNG, JPEG, WebP or GIF image."),
        ("empty.png", b"", "expected a PNG, JPEG, WebP or GIF image."),
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "expected a PNG, JPEG, WebP or GIF image."),
        (HOSTILE, good[:50], "the image is damaged, or too large."),
    ):
        attach(visit, **{name: data})
        page.get_by_role("alert").get_by_text(f"{name}: {why}").wait_for()
    assert page.locator("#attached img").count() == 0
    attach(visit, **{HOSTILE: good})
    page.get_by_role("img", name=HOSTILE).wait_for()
    page.locator("#attach-error").wait_for(state="hidden")
    page.get_by_role("button", name=f"Remove “{HOSTILE}”").wait_for()
    visit.say("hello")
    page.get_by_text("tokens at").wait_for()
    page.get_by_role("article", name="You").get_by_role("img", name=HOSTILE).wait_for()
    assert page.evaluate("document.querySelectorAll('[onerror]').length === 0 && !('hacked' in window)")


def test_large_images_become_smaller(visit: Visit) -> None:
    page, bodies = visit.page, sent(visit)
    wide = np.full((20, LARGEST_SIDE + 904, 3), (40, 120, 200), np.uint8)
    heavy = encoded(noise(1300, 1200))
    assert len(heavy) > LARGEST_BYTES
    as_it_is = encoded(noise(LARGEST_SIDE, 4))
    attach(visit, **{"wide.png": encoded(wide), "heavy.png": heavy, "just.png": as_it_is})
    page.get_by_role("img", name="just.png").wait_for()
    visit.say("hello")
    page.get_by_text("tokens at").wait_for()
    (kind, first), (_, second), third, _ = [data_of(part) for part in bodies[0][0]["content"][:3]] + [None]
    assert kind == "data:image/jpeg;base64"
    assert third == ("data:image/png;base64", as_it_is)
    assert len(second) <= LARGEST_BYTES
    small = PIL.Image.open(io.BytesIO(first))
    assert small.size == (LARGEST_SIDE, round(20 * LARGEST_SIDE / wide.shape[1]))
    assert np.abs(np.asarray(small).astype(int) - wide[0, 0]).max() <= 8  # JPEG rounds
    assert PIL.Image.open(io.BytesIO(second)).size == (1300, 1200)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_photo_is_sent_as_it_is_shown(visit: Visit, orientation: int) -> None:
    """A camera stores what it saw, and how to turn it; the model does not turn it."""
    colours = {"top": (220, 30, 30), "bottom": (30, 30, 220)}  # of the stored image, 48 x 32
    stored = np.empty((32, 48, 3), np.uint8)
    stored[:16], stored[16:] = colours["top"], colours["bottom"]
    file, exif = io.BytesIO(), PIL.Image.Exif()
    exif[0x0112] = orientation
    PIL.Image.fromarray(stored).save(file, "JPEG", exif=exif, quality=95)
    bodies = sent(visit)
    attach(visit, **{"photo.jpg": file.getvalue()})
    visit.page.get_by_role("img", name="photo.jpg").wait_for()
    visit.say("hello")
    visit.page.get_by_text("tokens at").wait_for()
    data = data_of(bodies[0][0]["content"][0])[1]
    assert (data == file.getvalue()) == (orientation == 1)
    got = np.asarray(PIL.Image.open(io.BytesIO(data))).astype(int)
    shown = {1: stored, 3: stored[::-1, ::-1], 6: np.rot90(stored, -1)}[orientation]
    assert got.shape == shown.shape
    assert np.abs(got[4:-4, 4:-4] - shown[4:-4, 4:-4]).mean() < 16  # the seam between the colours is soft


def test_an_image_becomes_as_small_as_it_must(visit: Visit) -> None:
    sizes = visit.page.evaluate(
        """async (url) => {
          const { redraw } = await import("/web/images.js");
          const image = new Image();
          image.src = url;
          await image.decode();
          const bitmap = await createImageBitmap(image);
          return Promise.all([1e6, 1e4, 1e3].map(async (most) => {
            const small = await redraw(bitmap, most);
            const { width, height } = await createImageBitmap(small);
            return [small.size, small.type, width, height];
          }));
        }""",
        f"data:image/png;base64,{base64.b64encode(encoded(noise(300, 200))).decode()}",
    )
    assert sizes[0][2:] == [300, 200]
    for most, (size, kind, width, height) in zip((1e6, 1e4, 1e3), sizes, strict=True):
        assert size <= most
        assert kind == "image/jpeg"
        assert abs(width * 2 - height * 3) <= 3
    assert sizes[1][2] > sizes[2][2]


def test_images_that_find_no_room_are_told_and_the_text_is_kept(visit: Visit) -> None:
    page, bodies = visit.page, sent(visit)
    page.evaluate(
        """() => {
          localStorage.setItem("room", "x".repeat(16384));
          for (let size = 1 << 22; size >= 1; size /= 2) {
            for (let number = 0; number < 4; number += 1) {
              try { localStorage.setItem(`junk-${size}-${number}`, "x".repeat(size)); } catch { break; }
            }
          }
          localStorage.removeItem("room");
        }"""
    )
    attach(visit, **{"cat.png": encoded(noise(100, 100))})
    page.get_by_role("img", name="cat.png").wait_for()
    visit.say("what is this?")
    page.get_by_text("This browser has no room to keep the images of the conversation").wait_for()
    page.get_by_text("tokens at").wait_for()
    visit.say("again?")
    page.get_by_text("tokens at").nth(1).wait_for()
    assert bodies[1][0] == bodies[0][0]  # it is there until the page is left
    page.reload()
    page.get_by_text("cat.png was not kept by this browser, and is no longer sent.").wait_for()
    page.get_by_role("article", name="You").get_by_text("what is this?").wait_for()
    visit.say("and now?")
    page.get_by_text("tokens at").nth(2).wait_for()
    assert bodies[2][0] == {"role": "user", "content": "what is this?"}


def test_a_model_that_reads_text_only(go: Go, service: ScriptedService) -> None:
    page = go().page
    page.get_by_text("k2", exact=True).wait_for()
    page.get_by_role("button", name="Attach images").wait_for(state="hidden")
    assert page.evaluate(DROP, [transfer(**{"cat.png": encoded(noise(9, 9))}), []])
    page.get_by_role("alert").get_by_text("This model reads text only.").wait_for()
    assert page.locator("#attached img").count() == 0


def test_a_model_that_is_still_loading(go: Go, seeing: ScriptedService) -> None:
    visit = go(ready=False)
    visit.page.get_by_text("The model is loading").wait_for()
    service: Any = seeing
    visit.backend.serve(Served(service, service))  # type: ignore[union-attr]
    visit.page.get_by_role("button", name="Attach images").wait_for()


def test_a_server_s_refusal_is_told_in_its_words(visit: Visit, seeing: ScriptedService) -> None:
    attach(visit, **{"cat.png": encoded(noise(9, 9))})
    visit.page.get_by_role("img", name="cat.png").wait_for()
    seeing.images = None  # another model is served there now
    visit.say("what is this?")
    visit.page.get_by_role("alert").get_by_text("messages[0].content[0]").wait_for()
    seeing.images = ImageFormat()
    visit.page.get_by_role("button", name="Try again").click()
    visit.page.get_by_text("tokens at").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_images_are_legible_named_and_fit(go: Go, seeing: ScriptedService, tokenizer: Tokenizer, scheme: str) -> None:
    seeing.scripts = [Script(one_by_one(tokenizer, THOUGHT))]
    visit = go({"color_scheme": scheme, "viewport": {"width": 360, "height": 640}})
    page = visit.page
    lost = {"role": "user", "content": "x", "images": [{"name": "lost.png" * 20, "url": None}]}
    chat = {"id": "a", "title": "a", "updated": 1, "messages": [lost]}
    page.evaluate("(chat) => localStorage.setItem('hybrid-k2.chat.a', chat)", json.dumps(chat))
    page.goto(f"{visit.address}#chat/a")
    page.reload()
    page.get_by_text("was not kept by this browser").wait_for()
    page.get_by_role("button", name="Attach images").wait_for()
    name = f"{'cat' * 50}.png"
    for _ in range(2):
        attach(visit, **{name: encoded(noise(900, 20)), "tall.png": encoded(noise(20, 900)), "text.png": b"text"})
        page.get_by_role("alert").get_by_text("text.png").wait_for()
        assert page.evaluate(CONTRAST) == []
        assert page.evaluate(NAMELESS) == []
        assert not page.evaluate(
            "document.documentElement.scrollWidth > 360 || document.getElementById('log').scrollWidth > 360"
        )
        if seeing.scripts:
            visit.say("hello")
            page.get_by_text("tokens at").wait_for()
            page.locator(".user img").last.wait_for()
