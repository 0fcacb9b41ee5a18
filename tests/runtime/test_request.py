"""What a request takes: every argument is checked when it is made."""

from __future__ import annotations

import datetime
import json
import os
import threading
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from fake_engines import FakeEngines
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sd35_trt.errors import Sd35Error, UsageError
from sd35_trt.formats.bundle import Bundle, Manifest
from sd35_trt.runtime import Pipeline
from sd35_trt.runtime.pool import PipelinePool
from sd35_trt.runtime.prompts import Prompt
from sd35_trt.runtime.request import Request, make_request

PICTURE = np.zeros((64, 64, 3), np.uint8)
LATENTS = np.zeros((1, 16, 8, 8), np.float32)
#: As a text cut within an emoji arrives in JSON.
CUT = json.loads(r'"a star \ud83d"')


@pytest.fixture(scope="module")
def manifest(mini_bundle: Path) -> Manifest:
    return Bundle.open(mini_bundle).manifest


def request(manifest: Manifest, **arguments: Any) -> Request:
    defaults: dict[str, Any] = dict.fromkeys(
        ("steps", "guidance", "shift", "size", "sampler", "t5_tokens", "image")
    )
    defaults |= {"prompt": "a star", "negative": "", "seed": 0, "batch": 1, "strength": 0.6}
    return make_request(manifest, **defaults | arguments)


class Hostile:
    """What nobody can print."""

    def __repr__(self) -> str:
        raise RuntimeError("no name")


#: Of no argument's kind.
STRANGE: list[Any] = [
    b"a star", bytearray(b"a"), {"a": 1}, {"a"}, object(), Hostile(), 1j, Decimal(1), Fraction(1),
    datetime.timedelta(1), True, False, np.bool_(True), np.zeros((2, 2)), iter("ab"), range(2),
    float("nan"), float("inf"), 10**400, 10**5000, [[1]], [None], [b"a"], ["a", None], [True],
    [1.5],
]  # fmt: skip
KINDS = {
    "prompt": [None, 17, 1.0, *STRANGE],
    "negative": [None, 17, *STRANGE],
    "seed": [None, "7", 7.5, [7.9], "", 2**64, [2**64], *STRANGE],
    "steps": ["6", 6.5, [6], *STRANGE],
    "guidance": ["3", [3.0], 1e39, -0.1, 100.5, *STRANGE],
    "shift": ["3", 1e-300, 0, 101, *STRANGE],
    "size": [128, "64x64", (64,), (64, 64, 64), (64, "64"), (64.5, 64), *STRANGE],
    "batch": ["1", None, 1.5, *STRANGE],
    "sampler": [17, ["euler"], "ddim", *STRANGE],
    "t5_tokens": ["77", 77.5, *STRANGE],
    "strength": [None, "1", -1, 1.1, *STRANGE],
    "image": [17, [[0]], PICTURE.astype(float), np.zeros((0, 64, 3), np.uint8), *STRANGE],
    "mask": [17, [[0]], np.zeros((64, 64)), *STRANGE],
    "latents": [
        17,
        [[0]],
        LATENTS.astype(float),
        LATENTS[:, :4],
        LATENTS[0, 0],
        LATENTS[:0],
        LATENTS + np.float32(np.nan),
        *STRANGE,
    ],
    "decode": [None, 0, "no", [True], {}],
    "paste": [None, 1, "yes", [True], {}],
    "prompt_2": [17, *STRANGE],
    "prompt_3": [17, *STRANGE],
    "negative_2": [17, *STRANGE],
    "negative_3": [17, *STRANGE],
    "weighting": [None, 1, "yes", [True], {}],
    "skip_guidance_layers": [17, "7", [7.5], *STRANGE],
    "skip_layer_guidance_scale": [None, "3", 101, *STRANGE],
    "skip_layer_guidance_start": [None, "0", -0.1, *STRANGE],
    "skip_layer_guidance_stop": [None, "1", 1.1, *STRANGE],
}


@pytest.mark.parametrize("name", list(KINDS))
def test_another_kind(name: str, manifest: Manifest) -> None:
    for value in KINDS[name]:
        with pytest.raises(UsageError) as caught:
            request(manifest, **{name: value})
        message = str(caught.value)
        assert name in message or "sampler" in message, message
        assert len(message) < 300
        assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "value", "field", "result"),
    [
        ("steps", 6.0, "steps", 6),
        ("steps", np.int16(6), "steps", 6),
        ("seed", 7.0, "seeds", (7,)),
        ("seed", np.array([7]), "seeds", (7,)),
        ("seed", np.float32(7), "seeds", (7,)),
        ("seed", 2**64 - 1, "seeds", (2**64 - 1,)),
        ("size", [64.0, np.int64(128)], "latent_size", (16, 8)),
        ("guidance", 0, "guidance", (1.0,)),
        ("guidance", 0.5, "guidance", (1.0,)),
        ("guidance", np.float16(3), "guidance", (3.0,)),
        ("shift", 2, "shift", 2.0),
        ("prompt", CUT, "prompts", (Prompt(*["a star \ufffd"] * 3),)),
        ("prompt", ("a", ), "prompts", (Prompt("a", "a", "a"),)),
        ("negative", [CUT], "negatives", (Prompt(*["a star \ufffd"] * 3),)),
    ],
)  # fmt: skip
def test_what_is_meant(
    name: str, value: Any, field: str, result: object, manifest: Manifest
) -> None:
    value = getattr(request(manifest, **{name: value}), field)
    assert value == result
    assert type(value) is type(result)


def test_a_long_prompt(manifest: Manifest) -> None:
    with pytest.raises(UsageError, match="prompt has 10,001 characters, 10,000 are allowed"):
        request(manifest, prompt="a" * 10_001)
    with pytest.raises(UsageError, match=r"negative\[0\] has 11 characters"):
        request(manifest, negative=["b" * 11], max_prompt_chars=10)
    assert request(manifest, prompt="a" * 10_000).prompts[0].clip_l == "a" * 10_000


@pytest.mark.parametrize("strength", [1e-17, 0.0])
def test_less_than_a_step(strength: float, manifest: Manifest) -> None:
    with pytest.raises(UsageError, match=r"of 10 steps is none — give at least 0\.1$"):
        request(manifest, image=PICTURE, steps=10, strength=strength)
    # diffusers draws one.
    assert request(manifest, image=PICTURE, steps=10, strength=0.01).first_step == 9


def _anything() -> st.SearchStrategy[Any]:
    single = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
        st.text(st.characters(categories=("Cs",)), max_size=3), st.binary(max_size=5),
        st.sampled_from([1, 2, 64, 128, 3.0, "euler", np.int32(4), np.float64(0.5)]),
        st.sampled_from([PICTURE, LATENTS]),
    )  # fmt: skip
    return st.one_of(
        single, st.lists(single, max_size=4), st.tuples(single, single),
        st.dictionaries(st.text(max_size=2), single, max_size=2),
    )  # fmt: skip


def _check(pipe: Pipeline, arguments: dict[str, Any]) -> None:
    try:
        made = pipe.request(**{"prompt": "a star", **arguments})
        result = pipe.generate(**{"prompt": "a star", **arguments})
        assert len(result.images) == (len(made.seeds) if made.decode else 0)
        assert result.latents.any()
    except Sd35Error as error:
        message = str(error)
    else:
        message = ""
        _check_made(made)
    assert "\n" not in message


def _check_made(made: Request) -> None:
    json.dumps(made.parameters()).encode()
    assert all(type(t) is str and t.encode() is not None for own in made.prompts for t in own[:3])
    assert all(type(seed) is int for seed in made.seeds)
    assert 0 <= made.first_step < made.steps or made.from_noise
    assert made.dims["batch"] == len(made.prompts) == len(made.negatives) == len(made.guidance)


@pytest.fixture(scope="module")
def stub(tiny_bundle: Path) -> Iterator[Pipeline]:
    """Its engines compute next to nothing."""
    with FakeEngines().pipeline(tiny_bundle) as pipe:
        yield pipe


_ARGUMENTS = st.dictionaries(st.sampled_from(sorted(KINDS)), _anything(), min_size=1, max_size=5)
_FIXTURE = (HealthCheck.too_slow,)


@settings(max_examples=1000, deadline=None, suppress_health_check=_FIXTURE)
@given(arguments=_ARGUMENTS)
def test_any_arguments(stub: Pipeline, arguments: dict[str, Any]) -> None:
    """Drawn, with values of their kinds, or refused in one line."""
    _check(stub, arguments)


@pytest.mark.nightly
@settings(max_examples=10_000, deadline=None, suppress_health_check=_FIXTURE)
@given(arguments=_ARGUMENTS)
def test_many_arguments(stub: Pipeline, arguments: dict[str, Any]) -> None:
    _check(stub, arguments)


# Of a pool.


@pytest.fixture(scope="module")
def pool(mini_bundle: Path) -> Iterator[PipelinePool]:
    with PipelinePool({"a": mini_bundle}, preload=False) as pool:
        yield pool


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"cancel": True}, "cancel must be a threading.Event"),
        ({"cancel": "yes"}, "cancel must be"),
        ({"callback": 3}, "callback must be a function"),
        ({"key": 17}, "key must be text"),
        ({"timeout": "3"}, "timeout must be a number"),
        ({"timeout": float("nan")}, "timeout must be"),
        ({"timeout": float("inf")}, "timeout must be"),
        ({"bundle": ["a"]}, "the pool has no bundle"),
        ({"bundle": 17}, "the pool has no bundle"),
        ({"prompt": None}, "prompt must be"),
        ({"negative": None}, "negative must be"),
        ({"shift": 1e-300}, "shift must be 0.01 to 100"),
    ],
)
def test_a_request_of_a_pool(arguments: dict[str, Any], words: str, pool: PipelinePool) -> None:
    for ask in (pool.submit, pool.generate):
        with pytest.raises(UsageError, match=words):
            ask(**{"prompt": "a star"} | arguments)  # type: ignore[operator]
    assert pool.waiting == 0


def test_a_key_cut_within_a_character(pool: PipelinePool) -> None:
    event = threading.Event()
    event.set()
    assert pool.submit("a star", key=CUT, cancel=event, steps=1).exception(60) is not None


# Pictures.


def pixels(manifest: Manifest, image: Any) -> np.ndarray:
    made = request(manifest, image=image)
    assert made.image is not None
    return made.image[0]


def test_a_photo_is_taken_upright(manifest: Manifest, tmp_path: Path) -> None:
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, :64] = 255
    photo = Image.fromarray(wide)
    exif = photo.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    path = tmp_path / "photo.png"
    photo.save(path, exif=exif)
    for image in (path, str(path), Image.open(path)):
        upright = pixels(manifest, image)
        assert upright.shape == (128, 64, 3)
        assert (upright[:60] == 255).all()
        assert (upright[-60:] == 0).all()


def test_sixteen_bits_are_scaled(manifest: Manifest, tmp_path: Path) -> None:
    grey = np.full((64, 64), 32768, np.uint16)
    path = tmp_path / "grey.png"
    Image.fromarray(grey).save(path)
    assert (pixels(manifest, path) == 128).all()
    assert (pixels(manifest, Image.fromarray(grey.astype(np.int32))) == 128).all()
    with pytest.raises(UsageError, match="more than 16 bits"):
        pixels(manifest, Image.fromarray(np.full((64, 64), 1 << 20, np.int32)))
    with pytest.raises(UsageError, match="floating-point"):
        pixels(manifest, Image.fromarray(np.zeros((64, 64), np.float32)))


def test_what_is_transparent_is_white(manifest: Manifest) -> None:
    hidden = np.zeros((64, 64, 4), np.uint8)
    hidden[..., 0] = 200
    assert (pixels(manifest, Image.fromarray(hidden)) == 255).all()
    half = hidden.copy()
    half[..., 3] = 128
    assert abs(pixels(manifest, Image.fromarray(half)).astype(int) - [227, 127, 127]).max() <= 1
    palette = Image.new("P", (64, 64), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.info["transparency"] = 1
    assert (pixels(manifest, palette) == 255).all()


def test_no_picture(manifest: Manifest, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "text.png").write_text("no picture")
    for path in (
        tmp_path / "fifo",
        tmp_path / "text.png",
        tmp_path / "none",
        tmp_path,
        "/dev/zero",
        "a" * 5000,
        "a\0b",
        "",
    ):
        with pytest.raises(UsageError, match="picture"):
            pixels(manifest, path)


def test_a_bundle_keeps_its_own_shift(manifest: Manifest) -> None:
    """A checkpoint's may be larger than what a request may ask for."""
    scheduler = msgspec.structs.replace(manifest.scheduler, shift=500.0)
    own = msgspec.structs.replace(manifest, scheduler=scheduler)
    assert request(own).shift == 500.0
    with pytest.raises(UsageError, match="shift must be"):
        request(own, shift=500.0)


def test_half_a_picture(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "half.png"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    for image in (path, Image.open(path)):
        with pytest.raises(UsageError, match="truncated"):
            pixels(manifest, image)


def test_guidance_up_to_one_is_off(mini_bundle: Path) -> None:
    """As in diffusers, whose Turbo examples give 0."""
    with Pipeline.load(mini_bundle) as pipe:
        plain, zero, half = (
            pipe.generate("a red star", guidance=g, steps=2, size=(64, 64), negative="blue")
            for g in (1.0, 0.0, 0.5)
        )
    assert (plain.images == zero.images).all()
    assert (plain.images == half.images).all()
    assert zero.notes == plain.notes != ()


@pytest.mark.parametrize("budget", [8, "8", "", [8], 8.5, True, -1, 2**70])
def test_a_budget_that_is_none(budget: Any, mini_bundle: Path) -> None:
    with pytest.raises(UsageError):
        Pipeline.load(mini_bundle, vram_budget=budget)
