"""The page in a real browser: a drawing, a wrong value, a second user who waits, a user who leaves."""

import io
import threading
import time
import urllib.request
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import browser, missing, requested

import tqdit
from tqdit.imaging.generate import to_pil
from tqdit.serving.drawing import Frame
from tqdit.serving.gallery import Gallery
from tqdit.serving.request import Request
from tqdit.serving.sampled import Sampled
from tqdit.serving.server import served

pytestmark = [
    pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed (the extra `serve`)"),
    pytest.mark.skipif(find_spec("selenium") is None, reason="selenium is not installed (the extra `dev`)"),
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.slow,
]
PATIENCE = 60.0  # seconds; a step takes milliseconds, and the machine may be busy


class Held(Sampled):
    """A model that draws only while its gate is open, and counts its frames."""

    gate: threading.Event
    waits: bool
    count: int

    def __init__(self, model: Sampled) -> None:
        super().__init__(**vars(model))
        vars(self).update(gate=threading.Event(), waits=False, count=0)
        self.gate.set()

    def frames(self, request: Request) -> Generator[Frame, None, None]:
        for frame in super().frames(request):
            vars(self).update(waits=True)
            self.gate.wait(PATIENCE)
            vars(self).update(count=self.count + 1)
            yield frame


@pytest.fixture
def held(side_by_side: Gallery) -> Held:
    return Held(side_by_side.models[0])


@pytest.fixture
def address(held: Held, side_by_side: Gallery) -> Iterator[str]:
    with served(replace(side_by_side, models=(held, side_by_side.models[1]))) as found:
        yield found
        held.gate.set()


@pytest.fixture(scope="module")
def first() -> Iterator[Any]:
    with browser(1400, 1000) as driver:
        yield driver


@pytest.fixture(scope="module")
def second() -> Iterator[Any]:
    with browser(390, 900) as driver:
        yield driver


def test_a_drawing_is_what_sample_draws(address: str, artifact: Path, first: Any) -> None:
    opened(first, address)
    choose(first, "condition", "sneaker")
    fill(first, "seed", "5")
    fill(first, "steps", "13")
    press(first, "draw")
    seen: dict[str, None] = {}  # addresses of the first model's pictures, in order

    def finished() -> bool:
        seen.update(dict.fromkeys(pictures(first, 0)))
        return all("13 of 13" in text(first, number) for number in (0, 1)) and "dB" in text(first, 1)

    until(finished)
    assert len(seen) >= 3, "the preview changes while the image is drawn"
    for number, model in enumerate(("fashion-dit", artifact)):
        expected = tqdit.sample(model, ["sneaker"], 1, tqdit.Sampling(steps=13), seed=5, device="cpu")
        until(lambda number=number, expected=expected: same(pictures(first, number), expected))
    assert "ms" in text(first, 0)
    assert [url for url in requested(first) if not url.startswith(address)] == []


def test_wrong_values_get_a_message_and_the_page_lives_on(address: str, held: Held, second: Any) -> None:
    opened(second, address)
    for field, value, right, message in (
        ("steps", "0", "2", "steps must be at least 1, got 0"),
        ("seed", "1.5", "0", "seed must be a whole number, got 1.5"),
    ):
        fill(second, field, value)
        press(second, "draw")
        until(lambda message=message: message in second.find_element("tag name", "body").text)
        fill(second, field, right)
    assert held.count == 0, "nothing is drawn for a wrong value"
    press(second, "draw")
    until(lambda: "2 of 2" in text(second, 0))


def test_a_second_user_waits_and_one_who_leaves_frees_the_place(
    address: str, held: Held, first: Any, second: Any
) -> None:
    for driver, steps in ((first, "500"), (second, "2")):
        opened(driver, address)
        fill(driver, "steps", steps)
    held.gate.clear()
    press(first, "draw")
    until(lambda: held.waits)
    press(second, "draw")
    until(lambda: "queue: 1/1" in text(second, 0))
    assert held.count == 0
    held.gate.set()
    until(lambda: held.count >= 3)
    first.get("about:blank")
    until(lambda: "2 of 2" in text(second, 0))
    until(lambda: not held.model._forward_hooks)
    assert held.count < 500, "the drawing of the user who left has ended early"


def test_the_button_stops_a_drawing(address: str, held: Held, first: Any) -> None:
    opened(first, address)
    fill(first, "steps", "900")
    press(first, "draw")
    until(lambda: held.count >= 3)
    press(first, "stop")
    until(lambda: not grows(held) and not held.model._forward_hooks)
    assert held.count < 900
    fill(first, "steps", "2")
    press(first, "draw")
    until(lambda: "2 of 2" in text(first, 0))


def grows(held: Held) -> bool:
    """Whether more frames are drawn within a moment."""
    before = held.count
    time.sleep(0.7)
    return held.count > before


def until(condition: Callable[[], Any]) -> None:
    """Wait for a condition, which may look at elements that are being replaced."""
    from selenium.common.exceptions import StaleElementReferenceException

    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if condition():
                return
        except StaleElementReferenceException:
            pass
        time.sleep(0.05)
    pytest.fail(f"waited {PATIENCE:g} seconds in vain")


def opened(driver: Any, address: str) -> None:
    driver.get(address)
    until(lambda: driver.find_elements("id", "draw"))


def press(driver: Any, button: str) -> None:
    driver.find_element("id", button).click()


def box(driver: Any, field: str) -> Any:
    return driver.find_element("css selector", f"#{field} input")


def fill(driver: Any, field: str, value: str) -> None:
    from selenium.webdriver.common.keys import Keys

    box(driver, field).send_keys(Keys.CONTROL, "a")
    box(driver, field).send_keys(value, Keys.TAB)


def choose(driver: Any, field: str, name: str) -> None:
    from selenium.webdriver.common.keys import Keys

    box(driver, field).send_keys(Keys.CONTROL, "a")
    box(driver, field).send_keys(name, Keys.ENTER)


def text(driver: Any, number: int) -> str:
    return driver.find_element("id", f"model-{number}").text


def pictures(driver: Any, number: int) -> list[str]:
    return [image.get_attribute("src") for image in driver.find_elements("css selector", f"#model-{number} img")]


def same(addresses: list[str], pixels: torch.Tensor) -> bool:
    """Whether the one picture on show is that of (1, C, H, W) pixels, byte for byte of its PNG's pixels."""
    from PIL import Image

    (address,) = addresses
    with urllib.request.urlopen(address) as answer:
        picture = Image.open(io.BytesIO(answer.read()))
    (expected,) = to_pil(pixels)
    return picture.convert(expected.mode).tobytes() == expected.tobytes() and picture.size == expected.size
