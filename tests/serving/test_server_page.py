"""The page at / in Chromium: it draws, shows previews and keeps a history."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chromium
import numpy as np
import pytest
from chromium import Chromium
from control_nets import every_feature
from fake_engines import FakeEngines
from PIL import Image
from servers import TOKEN, Running, picture_file, running

from sd35_trt.runtime import Control, Pipeline
from sd35_trt.serving.settings import Settings

pytestmark = pytest.mark.skipif(
    chromium.PROGRAM is None, reason="no chromium here: apt-get install chromium"
)

_FINISHED = "document.querySelector('#message').textContent.startsWith('Seed 5, ')"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="module")
def server(mini_bundle: Path) -> Iterator[Running]:
    with running({"mini": Pipeline.load(mini_bundle, threads=1)}, Settings(local=True)) as server:
        yield server


def test_it_draws(browser: Chromium, server: Running, tmp_path: Path) -> None:
    browser.requested.clear()
    browser.complaints.clear()
    browser.open(server.url)
    browser.wait("document.querySelector('#steps').placeholder === '28'")
    browser.evaluate(
        "window.seen = []; new MutationObserver(() => {"
        "  const picture = document.querySelector('#pictures img');"
        "  if (picture) window.seen.push(picture.alt + ' ' + picture.naturalWidth);"
        "}).observe(document.querySelector('#pictures'), {subtree: true, attributes: true})"
    )
    for field, value in (("prompt", "a large red circle"), ("seed", "5"), ("steps", "8")):
        browser.fill(field, value)
    browser.click("#draw")
    browser.wait(_FINISHED)
    browser.wait("document.querySelector('#pictures img').naturalWidth === 128")
    assert "unfinished 16" in browser.evaluate("window.seen")
    assert browser.evaluate("document.querySelector('#progress').value") == 8
    assert browser.evaluate("document.querySelectorAll('#history img').length") == 1
    browser.screenshot(tmp_path / "page.png")
    assert len(np.unique(np.asarray(Image.open(tmp_path / "page.png")))) > 50
    for hidden in ("#token", "#net"):
        assert browser.evaluate(f"document.querySelector('{hidden}').offsetParent === null")
    assert browser.complaints == []
    foreign = [url for url in browser.requested if not url.startswith((server.url, "data:"))]
    assert foreign == []


def test_it_starts_from_a_picture_and_the_history_brings_a_request_back(
    browser: Chromium, server: Running, tmp_path: Path
) -> None:
    browser.open(server.url)
    browser.wait("document.querySelector('#steps').placeholder === '28'")
    browser.choose("image", picture_file(tmp_path, (128, 64)))
    for field, value in (("prompt", "a star"), ("seed", "5"), ("steps", "4"), ("n", "2")):
        browser.fill(field, value)
    browser.click("#draw")
    browser.wait("document.querySelectorAll('#history img').length === 2")
    assert browser.evaluate("document.querySelector('#pictures img').naturalWidth") == 128
    browser.fill("prompt", "something else")
    browser.click("#history button")
    fields = "['prompt', 'seed', 'n'].map((id) => document.getElementById(id).value)"
    assert browser.evaluate(fields) == ["a star", "6", "1"]


def test_it_follows_a_picture(
    browser: Chromium, make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """In a generation and in an edit; bundles without nets offer none."""
    pipe = Pipeline.load(make_bundle(**every_feature(tmp_path / "nets")), threads=1)
    file = picture_file(tmp_path, (128, 64))
    quick: dict[str, Any] = {"seed": 5, "steps": 4}
    nets = {"depth": Control(file, 0.5)}
    settings = Settings(local=True)
    with running({"mini": pipe}, settings) as server:
        own = [
            pipe.generate("a star", controls=nets, **quick),
            pipe.generate("a star", controls=nets, image=file, **quick),
        ]
        browser.open(server.url)
        browser.wait("!document.querySelector('#net').parentElement.hidden")
        browser.choose("followed", file)
        for field, value in (("prompt", "a star"), ("seed", "5"), ("steps", "4")):
            browser.fill(field, value)
        browser.evaluate("document.querySelector('#net').value = 'depth'")
        browser.fill("scale", "0.5")
        for number, expected in enumerate(own, 1):
            browser.click("#draw")
            browser.wait(f"document.querySelectorAll('#history img').length === {number}")
            shown = browser.evaluate("document.querySelector('#pictures img').src")
            drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown.partition(",")[2]))))
            np.testing.assert_array_equal(drawn, expected.images[0])
            browser.choose("image", file)


def test_it_says_what_is_wrong_and_stops(browser: Chromium, tiny_bundle: Path) -> None:
    engines = FakeEngines()
    settings = Settings(token=TOKEN)
    with running({"tiny": engines.pipeline(tiny_bundle)}, settings) as server:
        browser.open(server.url)
        browser.wait("!document.querySelector('#access').hidden")
        browser.fill("token", TOKEN)
        browser.evaluate("document.querySelector('#token').dispatchEvent(new Event('change'))")
        browser.wait("document.querySelector('#steps').placeholder === '28'")
        browser.fill("size", "100x100")
        browser.click("#draw")
        browser.wait("document.querySelector('#message.failed')?.textContent.includes('nearest')")
        browser.fill("size", "64x64")
        engines.hold()
        browser.click("#draw")
        engines.wait_for_step()
        browser.click("#stop")
        browser.wait("document.querySelector('#message').textContent === 'Stopped.'")
        engines.release()


def test_the_endpoints_are_listed(browser: Chromium, server: Running) -> None:
    browser.complaints.clear()
    browser.open(f"{server.url}/docs")
    browser.wait("document.querySelectorAll('h2').length === 11")
    text = browser.evaluate("document.body.innerText")
    assert "POST /v1/images/edits" in text
    assert "strength" in text
    assert browser.complaints == []
