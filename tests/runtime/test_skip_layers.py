"""Skip-layer guidance: as diffusers draws with it, joined with other requests, and refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from against_diffusers import PROMPT, SEED, draw_with_diffusers, load_diffusers
from conftest import psnr, relative_error
from fake_gpu import QueuedSession, install_fake

from sd35_trt.build import BuildOptions, build
from sd35_trt.errors import UsageError
from sd35_trt.formats.bundle import Bundle
from sd35_trt.mini import checkpoint_path
from sd35_trt.runtime import Pipeline
from sd35_trt.runtime.job import Job, Result
from sd35_trt.runtime.skip_layers import SkipLayers

QUICK: dict[str, Any] = {"steps": 4, "size": (64, 64), "guidance": 3.0}
SKIP: dict[str, Any] = {
    "skip_guidance_layers": [1, 3],
    "skip_layer_guidance_scale": 2.0,
    "skip_layer_guidance_start": 0.1,
    "skip_layer_guidance_stop": 0.7,
}


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path]) -> Path:
    """Mini in FP32, with skip-layer guidance."""
    return make_bundle(skip_layer_guidance=True)


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(bundle) as pipe:
        yield pipe


def compare(pipe: Pipeline, checkpoint: Path, tokens: int, **skip: Any) -> None:
    peer = load_diffusers(checkpoint)
    options: dict[str, Any] = {"steps": 5, "size": (128, 64), "batch": 2, "guidance": 3.0}
    result = pipe.generate(PROMPT, seed=SEED, t5_tokens=tokens, **options, **skip)
    without = pipe.generate(PROMPT, seed=SEED, t5_tokens=tokens, **options)
    latents, images = draw_with_diffusers(
        peer, 2, (128, 64), tokens, guidance_scale=3.0, num_inference_steps=5, **skip
    )
    assert relative_error(result.latents, latents) <= 1e-3
    assert psnr(result.images, images) >= 50
    assert relative_error(without.latents, latents) > 0.02


@pytest.mark.parametrize("layers", [[2], [0, 3, 5]])
def test_as_diffusers_draws(layers: list[int], pipe: Pipeline) -> None:
    compare(pipe, checkpoint_path(), 32, **{**SKIP, "skip_guidance_layers": layers})


@pytest.mark.nightly
@pytest.mark.parametrize("structure", ["large_checkpoint", "medium_checkpoint"])
def test_random_checkpoints(
    structure: str, make_bundle: Callable[..., Path], request: pytest.FixtureRequest
) -> None:
    """Second attentions, wide modulations, and a last block without text among the layers."""
    root = request.getfixturevalue(structure)
    with Pipeline.load(make_bundle(model=str(root), skip_layer_guidance=True)) as pipe:
        for layers in ([0], [1, 2]):
            compare(pipe, root, 77, **{**SKIP, "skip_guidance_layers": layers})


# Beside others.


def joined(pipe: Pipeline, requests: list[dict[str, Any]]) -> list[np.ndarray]:
    jobs = [Job(pipe.request(PROMPT, seed=i, **QUICK, **own)) for i, own in enumerate(requests)]
    assert len({job.request.in_common for job in jobs}) == 1
    pipe.draw(jobs)
    latents = []
    for job in jobs:
        assert isinstance(job.outcome, Result), job.outcome
        latents.append(job.outcome.latents)
    return latents


def test_requests_with_and_without_it_are_joined(pipe: Pipeline) -> None:
    later = {**SKIP, "skip_layer_guidance_start": 0.6, "skip_layer_guidance_stop": 1.0}
    requests: list[dict[str, Any]] = [{}, SKIP, {**later, "skip_guidance_layers": [0]}]
    together = joined(pipe, requests)
    for i, own in enumerate(requests):
        single = pipe.generate(PROMPT, seed=i, **QUICK, **own).latents
        assert relative_error(together[i], single) <= 1e-5, own


def test_off_it_leaves_no_trace(pipe: Pipeline, mini_bundle: Path) -> None:
    before = pipe.generate(PROMPT, seed=5, **QUICK).latents
    pipe.generate(PROMPT, seed=5, **QUICK, **SKIP)
    assert np.array_equal(pipe.generate(PROMPT, seed=5, **QUICK).latents, before)
    with Pipeline.load(mini_bundle) as plain:
        assert relative_error(before, plain.generate(PROMPT, seed=5, **QUICK).latents) <= 1e-5


def test_with_inpainting_and_adapters(
    make_bundle: Callable[..., Path], pipe: Pipeline, mini_bundle: Path
) -> None:
    """Inputs of all features are told apart, and each is off where it is not asked for."""
    path = make_bundle(skip_layer_guidance=True, inpainting=True, adapters=16)
    image = np.full((64, 64, 3), 90, np.uint8)
    mask = np.zeros((64, 64), bool)
    mask[16:48, 16:48] = True
    with Pipeline.load(path) as every:
        with Pipeline.load(mini_bundle) as plain:
            both = [p.generate(PROMPT, **QUICK).latents for p in (every, plain)]
        assert relative_error(*both) <= 1e-5
        both = [p.generate(PROMPT, **QUICK, **SKIP).latents for p in (every, pipe)]
        assert relative_error(*both) <= 1e-5
        drawn = every.generate(PROMPT, **QUICK, **SKIP, image=image, mask=mask, strength=1.0)
        other = every.generate(PROMPT, **QUICK, image=image, mask=mask, strength=1.0)
    inside = mask[::8, ::8]
    assert np.array_equal(drawn.latents[..., ~inside], other.latents[..., ~inside])
    assert relative_error(drawn.latents[..., inside], other.latents[..., inside]) > 0.01


def test_recorded_steps(bundle: Path, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps with and without a third branch are graphs of their own, in the same buffers."""
    fake = install_fake(monkeypatch)

    def open_session(own: Any, component: Any, device: Any, options: Any) -> QueuedSession:
        session = QueuedSession(fake, own, component, device)
        session.recordable = True
        return session

    with Pipeline(Bundle.open(bundle), open_session=open_session, device="cuda") as gpu:
        for own in (SKIP, {}, SKIP):
            request = {**QUICK, "steps": 12, "seed": 4, **own}
            ours, theirs = (p.generate(PROMPT, **request) for p in (gpu, pipe))
            assert np.array_equal(ours.latents, theirs.latents)
    assert "cudaGraphLaunch" in fake.calls


# Notes and refusals.


def test_notes(pipe: Pipeline) -> None:
    few = pipe.generate(PROMPT, **{**QUICK, "steps": 2}, skip_guidance_layers=[1])
    assert few.notes == ("none of 2 steps is between 0.01 and 0.2: no layer was skipped",)
    off = pipe.generate(PROMPT, **{**QUICK, "guidance": 1.0}, **SKIP)
    assert off.notes == ("without guidance, skip-layer guidance has no effect",)
    plain = pipe.generate(PROMPT, **{**QUICK, "guidance": 1.0})
    assert np.array_equal(off.latents, plain.latents)


def test_parameters_draw_it_again(pipe: Pipeline) -> None:
    parameters = pipe.request(PROMPT, **SKIP).parameters()
    assert {name: parameters[name] for name in SKIP} == SKIP


def test_refused(pipe: Pipeline, mini_bundle: Path, tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"skip_guidance_layers": [6]}, r"skip_guidance_layers\[0\] must be 0 to 5, not 6"),
        ({"skip_guidance_layers": 3}, "a list of numbers of blocks"),
        ({**SKIP, "skip_layer_guidance_scale": 1e9}, "skip_layer_guidance_scale must be"),
        ({**SKIP, "skip_layer_guidance_start": -1}, "skip_layer_guidance_start must be"),
        ({**SKIP, "skip_layer_guidance_stop": "x"}, "skip_layer_guidance_stop must be"),
    ]
    for arguments, message in wrong:
        with pytest.raises(UsageError, match=message):
            pipe.request(PROMPT, **arguments)
    with Pipeline.load(mini_bundle) as plain, pytest.raises(UsageError, match="--skip-layer-gui"):
        plain.request(PROMPT, **SKIP)
    options = BuildOptions(skip_layer_guidance=True, guidance=False, out=tmp_path / "x")
    with pytest.raises(UsageError, match="steers guidance"):
        build(options)


def test_steps_that_count() -> None:
    """As diffusers counts them: both ends are exclusive."""
    own = SkipLayers((1,), 2.8, 0.01, 0.2)
    assert [step for step in range(28) if own.counts(step, 28)] == [1, 2, 3, 4, 5]
    assert not any(own.counts(step, 4) for step in range(4))
