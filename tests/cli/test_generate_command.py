"""``sd35-trt generate`` as a user sees it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import one_error_line
from PIL import Image


def test_generate_writes_a_picture_with_its_parameters(run, mini_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = run(
        "generate", mini_bundle, "a red star", "--seed", 5, "--steps", 3, "--size", "192x128",
        "--negative", "blue", "--guidance", 3, "--shift", 2, "--sampler", "dpmpp-2m",
    )  # fmt: skip
    assert (status, out) == (0, "out.png\n")
    with Image.open("out.png") as image:
        assert image.size == (192, 128)
        request = json.loads(image.text["sd35-trt"])  # type: ignore[attr-defined]
    assert request["prompt"] == "a red star"
    assert request["negative"] == "blue"
    assert request["seed"] == 5
    assert (request["steps"], request["guidance"], request["shift"]) == (3, 3.0, 2.0)
    assert request["sampler"] == "dpmpp-2m"


def test_a_batch_makes_numbered_files(run, mini_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = run(
        "generate", mini_bundle, "a red star", "--seed", 8, "--steps", 2, "--batch", 2,
        "--out", "star.png", "--json",
    )  # fmt: skip
    assert status == 0
    data = json.loads(out)
    assert data["files"] == ["star-8.png", "star-9.png"]
    assert data["seconds"]["total"] > 0
    pictures = [np.asarray(Image.open(file)) for file in data["files"]]
    assert (pictures[0] != pictures[1]).any()


def test_image_to_image(run, mini_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    Image.new("RGB", (128, 128), "navy").save("in.png")
    status, _, _ = run("generate", mini_bundle, "a star", "--steps", 4, "--image", "in.png")
    assert status == 0
    assert Path("out.png").is_file()


def test_wrong_use_of_generate(run, mini_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    Path("text.png").write_text("no picture")
    cases: list[tuple[list[object], int, str]] = [
        (["--size", "100x100"], 2, "the nearest is 128x128"),
        (["--size", "big"], 2, "is not WxH"),
        (["--steps", "-1"], 2, "steps must be 1 to 1000, not -1"),
        (["--steps", "many"], 2, "is not a valid integer"),
        (["--out", "x.jpg"], 2, "does not end in .png"),
        (["--out", "no/such/x.png"], 2, "is not a writable directory"),
        (["--image", "none.png"], 2, "none.png is missing"),
        (["--image", "text.png"], 2, "not a readable picture"),
        (["--colour"], 2, "No such option"),
    ]
    for arguments, expected, words in cases:
        status, out, err = run("generate", mini_bundle, "a star", *arguments)
        assert status == expected, arguments
        assert out == ""
        assert words in one_error_line(err)
    assert sorted(p.name for p in Path().iterdir()) == ["text.png"]
    status, _, err = run("generate", "nowhere", "a star")
    assert status == 1
    assert "is not a bundle" in one_error_line(err)


@pytest.mark.parametrize("prompt", ["-a cat", "-5 degrees", "--turbo car", "--json", "—"])
def test_a_prompt_that_begins_with_a_dash(prompt: str, run) -> None:  # type: ignore[no-untyped-def]
    status, _, err = run("generate", "nowhere", prompt)
    if prompt == "—":
        assert "is not a bundle" in one_error_line(err)
        return
    assert status == 2
    advice = 'a prompt that begins with a dash follows --: sd35-trt generate BUNDLE -- "-…"'
    assert one_error_line(err).endswith(advice)
    for words in (["nowhere", "--", prompt], ["--seed", 1, "--", "nowhere", prompt]):
        status, _, err = run("generate", *words)
        assert status == 1
        assert "nowhere is not a bundle" in one_error_line(err)


def test_debug_as_a_prompt(run, mini_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    status, _, _ = run("generate", mini_bundle, "--steps", 1, "--", "--debug")
    assert status == 0
    with Image.open("out.png") as image:
        assert json.loads(image.text["sd35-trt"])["prompt"] == "--debug"  # type: ignore[attr-defined]


def test_long_prompts_are_noted(run, mini_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    status, out, err = run("generate", mini_bundle, "x" * 10_000, "--steps", 1)
    assert (status, out) == (0, "out.png\n")
    assert "the rest is ignored" in err
