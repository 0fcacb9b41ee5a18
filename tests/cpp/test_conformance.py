"""libsd35 draws what the Python runtime draws, bit for bit, on the same ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpp_adapters import adapters_of_the_cases
from cpp_build import BUNDLES, CASES, ROOT, built, bundle_options, run_program

from sd35_trt.runtime import Control, Pipeline, Result
from sd35_trt.runtime.job import Job, Step

# Of which one stands for all.
_TEXTS = ("negative", "prompt_2", "prompt_3", "negative_2", "negative_3")

# Bundles that no other daily test builds.
_SLOW = ("adapted fp8", "controlled half")


def picture(width: int, height: int) -> np.ndarray:
    """What the cases call ``image``."""
    y, x, channel = np.indices((height, width, 3))
    return ((x * (channel + 1) + 2 * y) % 256).astype(np.uint8)


def latents(*shape: int) -> np.ndarray:
    """What the cases call ``latents``."""
    values = np.arange(np.prod(shape)) * 7 % 64
    return (values.astype(np.float32) / 32 - 1).reshape(shape)


def arguments(request: dict[str, Any]) -> dict[str, Any]:
    """A case's request for Python."""
    own = dict(request)
    own.pop("watch", None)
    if "seeds" in own:
        own["seed"] = own.pop("seeds")
    if "image" in own:
        own["image"] = picture(*own["image"])
    if "latents" in own:
        own["latents"] = latents(*own["latents"])
    if "controls" in own:
        controls = own["controls"].items()
        own["controls"] = {n: Control(**{**c, "image": picture(*c["image"])}) for n, c in controls}
    if "mask" in own:
        size = own["image"].shape[:2] if "image" in own else _pixels(own["latents"])
        y, x = np.indices(size)
        own["mask"] = ((x + y + own["mask"]) % 256).astype(np.uint8)
    for name in (*_TEXTS, "adapters"):
        if len(own.get(name, [])) == 1:
            [own[name]] = own[name]
    return own


def _pixels(latents: np.ndarray) -> tuple[int, int]:
    """Height and width of what latents are of."""
    return latents.shape[2] * 8, latents.shape[3] * 8


def draw(
    pipe: Pipeline, requests: list[dict[str, Any]], denoised: list[np.ndarray]
) -> list[Result]:
    jobs = [Job(pipe.request(**arguments(request))) for request in requests]
    if requests[0].get("watch"):

        def watch(step: Step) -> None:
            denoised.append(step.denoised.copy())

        jobs[0].callback = watch
    pipe.draw(jobs)
    results = [job.outcome for job in jobs if isinstance(job.outcome, Result)]
    assert len(results) == len(jobs)
    return results


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.nightly] * (name in _SLOW)) for name in BUNDLES],
)
def test_the_cases_are_equal(name: str, make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle = make_bundle(**bundle_options(name, tmp_path))
    program = built() / "tests" / "conformance"
    adapters = adapters_of_the_cases(bundle, tmp_path)
    run_program(program, ROOT / "cpp/tests/cases.json", name, bundle, tmp_path, *adapters)
    with Pipeline.load(bundle, threads=1) as pipe:
        for path in adapters:
            pipe.load_adapter(path.stem, path)
        for number, case in enumerate(CASES):
            if case["bundle"] != name:
                continue
            denoised: list[np.ndarray] = []
            for part, result in enumerate(draw(pipe, case["requests"], denoised)):
                check(tmp_path / f"{number}-{part}", result, case["name"])
            if denoised:
                seen = np.fromfile(tmp_path / f"{number}-0.denoised", np.float32)
                np.testing.assert_array_equal(seen, np.stack(denoised).ravel(), case["name"])
        encoded = pipe.encode([picture(128, 64)] * 2)
        seen = np.fromfile(tmp_path / "encoded", np.float32)
        np.testing.assert_array_equal(seen, encoded.ravel())
        pixels = np.fromfile(tmp_path / "decoded", np.uint8)
        np.testing.assert_array_equal(pixels, pipe.decode(encoded).ravel())


def check(stem: Path, expected: Result, name: str) -> None:
    latents = np.fromfile(f"{stem}.latents", np.float32)
    np.testing.assert_array_equal(
        latents.view(np.uint32), expected.latents.ravel().view(np.uint32), name
    )
    if not expected.images.size:
        assert not Path(f"{stem}.images").exists(), name
    images = np.fromfile(f"{stem}.images", np.uint8) if expected.images.size else expected.images
    np.testing.assert_array_equal(images.ravel(), expected.images.ravel(), name)
    about = json.loads(Path(f"{stem}.json").read_text("utf-8"))
    assert about["parameters"] == expected.parameters, name
    assert about["notes"] == list(expected.notes), name
    assert about["seed"] == expected.seeds[0], name


def test_the_cases_hold_what_they_promise() -> None:
    """Guidance on and off, batches, joined requests, pictures, samplers, sizes, lengths, texts."""
    assert {case["bundle"] for case in CASES} == set(BUNDLES)
    assert {options.get("policy", "fp32") for options in BUNDLES.values()} == {
        "fp32", "half", "int8-weight", "fp8"
    }  # fmt: skip
    assert any(options.get("guidance") is False for options in BUNDLES.values())
    requests = [request for case in CASES for request in case["requests"]]
    assert any(len(case["requests"]) > 1 for case in CASES)
    assert {1, 3} <= {request.get("batch", 1) for request in requests}
    assert {None, "dpmpp-2m"} <= {request.get("sampler") for request in requests}
    assert len({request.get("t5_tokens") for request in requests}) >= 3
    fields = (
        "image", "negative", "guidance", "shift", "size", "seeds", "weighting", "mask", "paste",
        "skip_guidance_layers", "adapters", "controls", "latents", "decode", "watch", *_TEXTS,
    )  # fmt: skip
    for field in fields:
        assert any(field in request for request in requests), field
    names = [case["name"] for case in CASES]
    assert len(set(names)) == len(names)
