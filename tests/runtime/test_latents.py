"""Latents as what a request starts from and as what comes of it; the autoencoder by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engines import FakeEngines
from PIL import Image

from sd35_trt.errors import UsageError
from sd35_trt.runtime import Pipeline, PipelinePool

SIZE = (128, 64)
QUICK: dict[str, Any] = {"steps": 3, "guidance": 3.0}
ZEROS = np.zeros((1, 16, 8, 16), np.float32)


@pytest.fixture(scope="module")
def pipe(mini_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(mini_bundle) as pipeline:
        yield pipeline


def picture(shade: int = 0) -> np.ndarray:
    """uint8 [H, W, 3]."""
    rows, columns = np.mgrid[: SIZE[1], : SIZE[0]]
    return np.stack([rows * 2, columns * 2, np.full_like(rows, shade)], axis=-1).astype(np.uint8)


def test_a_picture_and_its_latents_start_the_same_run(pipe: Pipeline) -> None:
    from_pixels = pipe.generate("a red star", image=picture(), strength=0.7, **QUICK)
    latents = pipe.encode(picture())
    from_latents = pipe.generate("a red star", latents=latents, strength=0.7, **QUICK)
    assert latents.dtype == np.float32
    assert latents.shape == (1, 16, 8, 16)
    np.testing.assert_array_equal(from_latents.latents, from_pixels.latents)
    np.testing.assert_array_equal(from_latents.images, from_pixels.images)
    assert from_latents.parameters == from_pixels.parameters


def test_what_is_not_decoded_has_the_same_latents(pipe: Pipeline) -> None:
    whole = pipe.generate("a red star", size=SIZE, batch=2, **QUICK)
    latents = pipe.generate("a red star", size=SIZE, batch=2, decode=False, **QUICK)
    assert latents.images.shape == (0, SIZE[1], SIZE[0], 3)
    assert latents.pil() == []
    np.testing.assert_array_equal(latents.latents, whole.latents)
    np.testing.assert_array_equal(pipe.decode(latents.latents), whole.images)
    np.testing.assert_array_equal(pipe.decode(latents.latents[1]), whole.images[1:])


def test_no_decoder_loads_for_latents(tiny_bundle: Path) -> None:
    engines = FakeEngines()
    with engines.pipeline(tiny_bundle) as stub:
        stub.generate("a red star", steps=2, decode=False)
        assert "denoiser" in engines.opened
        assert "vae_decoder" not in engines.opened


def test_each_image_starts_from_latents_of_its_own(pipe: Pipeline) -> None:
    sources = pipe.encode([picture(0), Image.fromarray(picture(255))])
    together = pipe.generate("a red star", latents=sources, batch=2, seed=[5, 5], **QUICK)
    for own, latents in zip(sources, together.latents, strict=True):
        alone = pipe.generate("a red star", latents=own, seed=5, **QUICK).latents
        np.testing.assert_allclose(alone[0], latents, atol=2e-5)
    assert np.abs(together.latents[0] - together.latents[1]).max() > 0.1


def test_a_request_keeps_its_latents(pipe: Pipeline) -> None:
    latents = ZEROS.copy()
    request = pipe.request("a red star", latents=latents, batch=2)
    latents[:] = np.nan
    assert request.latents is not None
    assert request.latents.shape == (2, *ZEROS.shape[1:])
    assert not request.latents.any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"latents": ZEROS, "image": picture()}, "give one of them"),
        ({"latents": ZEROS, "size": (64, 64)}, r"\(128, 64\) — leave out the size"),
        ({"latents": np.repeat(ZEROS, 3, 0), "batch": 2}, "3 latents for 2 images"),
        ({"latents": ZEROS[..., :15]}, "the nearest is 128x64"),
        ({"latents": ZEROS.astype(np.float64)}, "not float32"),
        ({"latents": ZEROS[:, :4]}, r"not float32 \[images, 16, height, width\]"),
        ({"latents": ZEROS + np.float32(np.inf)}, "not finite"),
        ({"latents": ZEROS, "strength": 0.0}, "is none"),
        ({"latents": ZEROS, "paste": True}, "latents have none"),
        ({"size": SIZE, "paste": True, "decode": False}, "latents have none"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], words: str, pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match=words):
        pipe.request("a red star", **arguments)


def test_what_is_not_decoded(pipe: Pipeline) -> None:
    most = pipe.manifest.ranges.batch[1]
    with pytest.raises(UsageError, match=f"this bundle draws 1 to {most}"):
        pipe.decode(np.repeat(ZEROS, most + 1, axis=0))
    with pytest.raises(UsageError, match="not finite"):
        pipe.decode(ZEROS * np.float32(np.nan))


def test_what_is_not_encoded(pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match="several sizes: 64x64, 128x64"):
        pipe.encode([picture(), picture()[:, :64]])
    with pytest.raises(UsageError, match="the nearest is 64x64"):
        pipe.encode(picture()[:, :60])
    with pytest.raises(UsageError, match="0 images at once"):
        pipe.encode([])


def test_a_callback_cannot_decode(pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match=r"decode\(\) was called by a callback"):
        pipe.generate("a star", size=SIZE, callback=lambda s: pipe.decode(s.latents), **QUICK)


def test_runs_with_and_without_images_are_apart(tiny_bundle: Path) -> None:
    engines = FakeEngines(held=True)
    with PipelinePool({"one": engines.pipeline(tiny_bundle)}) as pool:
        first = pool.submit("a star", steps=1)
        engines.wait_for_step()  # the others wait together
        waiting = [pool.submit("a star", steps=1, decode=d) for d in (True, False, True)]
        engines.release()
        counts = [len(future.result(timeout=60).images) for future in (first, *waiting)]
    assert counts == [1, 1, 0, 1]
    assert engines.batches == [1, 2, 1]
