"""ControlNets: as diffusers draws with them, each image its own scale, off without a trace."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from against_diffusers import SEED
from conftest import psnr, relative_error
from control_nets import net_options, write_mini_nets, write_net
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from fake_gpu import QueuedSession, install_fake
from msgspec.structs import replace
from PIL import Image

from sd35_trt.build import BuildOptions, build
from sd35_trt.checkpoints.model_options import ControlNet
from sd35_trt.errors import BundleError, OutOfMemory, UsageError
from sd35_trt.formats.bundle import Bundle, Manifest
from sd35_trt.formats.contract import check_contract
from sd35_trt.mini import checkpoint_path
from sd35_trt.runtime import Control, Pipeline, PipelinePool
from sd35_trt.runtime.job import Job, Result
from sd35_trt.runtime.sessions.session import open_session
from sd35_trt.units import parse_bytes

PROMPT = "a small red circle to the left of a large blue square"
T5_TOKENS = 32
STEPS = 5
SIZE = (128, 64)
QUICK: dict[str, Any] = {"steps": STEPS, "size": SIZE, "guidance": 3.0, "t5_tokens": T5_TOKENS}


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As Medium's, two of them, and as Large's."""
    return write_mini_nets(tmp_path_factory.mktemp("nets"))


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path], nets: dict[str, Path]) -> Path:
    """Mini in FP32, with three nets."""
    return make_bundle(**net_options(nets))


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(bundle) as loaded:
        yield loaded


def picture(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)


# As diffusers draws.


def as_edges_are_taken(pipe: StableDiffusion3ControlNetPipeline) -> None:
    """What Stability's card says of its net for edges."""
    own = pipe.image_processor.preprocess

    def preprocess(image: Any, **options: Any) -> torch.Tensor:
        return (own(image, **options) / 2 + 0.5) * 255 * 0.5 + 0.5

    pipe.image_processor.preprocess = preprocess


def draw_with_diffusers(
    root: Path,
    paths: Sequence[Path],
    pictures: Sequence[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    edges: bool = False,
    t5_tokens: int = T5_TOKENS,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Latents and the image; the autoencoder gives the mean, as here."""
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean
    )
    models = [SD3ControlNetModel.from_pretrained(path) for path in paths]
    pipe = StableDiffusion3ControlNetPipeline.from_pretrained(
        root, controlnet=models if len(models) > 1 else models[0], dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    if edges:
        as_edges_are_taken(pipe)
    images = [Image.fromarray(own) for own in pictures]
    latents = pipe(
        PROMPT,
        negative_prompt="",
        control_image=images if len(images) > 1 else images[0],
        generator=torch.Generator("cpu").manual_seed(SEED),
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        width=SIZE[0],
        height=SIZE[1],
        max_sequence_length=t5_tokens,
        output_type="latent",
        **options,
    ).images
    with torch.no_grad():
        scaled = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        decoded = pipe.vae.decode(scaled).sample
    (image,) = pipe.image_processor.postprocess(decoded, output_type="pil")
    return latents.numpy(), np.asarray(image)[None]


def check(
    pipe: Pipeline, controls: dict[str, Control], latents: np.ndarray, images: np.ndarray, **kw: Any
) -> None:
    options = {**QUICK, **kw}
    result = pipe.generate(PROMPT, seed=SEED, controls=controls, **options)
    without = pipe.generate(PROMPT, seed=SEED, **options)
    assert relative_error(result.latents, latents) <= 1e-3
    assert psnr(result.images, images) >= 50
    assert relative_error(without.latents, latents) > 0.05


@pytest.mark.parametrize("name", ["canny", "edges"])
def test_one_net(
    name: str, pipe: Pipeline, nets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = draw_with_diffusers(
        checkpoint_path(), [nets[name]], [picture(1)], monkeypatch, name == "edges",
        controlnet_conditioning_scale=0.7,
    )  # fmt: skip
    check(pipe, {name: Control(picture(1), scale=0.7)}, *drawn)


def test_two_nets_with_scales_and_intervals(
    pipe: Pipeline, nets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They overlap in some steps; in one, none runs."""
    drawn = draw_with_diffusers(
        checkpoint_path(), [nets["canny"], nets["depth"]], [picture(1), picture(2)], monkeypatch,
        controlnet_conditioning_scale=[0.7, 0.4],
        control_guidance_start=[0.0, 0.2], control_guidance_end=[0.6, 0.8],
    )  # fmt: skip
    controls = {
        "depth": Control(picture(2), scale=0.4, start=0.2, end=0.8),
        "canny": Control(picture(1), scale=0.7, end=0.6),
    }
    check(pipe, controls, *drawn)


@pytest.mark.nightly
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("structure", ["large_checkpoint", "medium_checkpoint"])
def test_random_checkpoints(
    structure: str,
    joint: bool,
    make_bundle: Callable[..., Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Second attentions among the layers, and numbers of blocks that do not divide the model's."""
    root = request.getfixturevalue(structure)
    more = {"num_layers": 3} if structure == "medium_checkpoint" else {}
    net = write_net(tmp_path / "net", root, joint, **more)
    path = make_bundle(model=str(root), controlnets=(ControlNet("own", str(net), "blur"),))
    drawn = draw_with_diffusers(root, [net], [picture(3)], monkeypatch, t5_tokens=77)
    with Pipeline.load(path) as own:
        check(own, {"own": Control(picture(3))}, *drawn, t5_tokens=77)


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


def test_requests_of_the_same_nets_and_steps_are_joined(pipe: Pipeline) -> None:
    """Each image has its own picture and scale."""
    requests: list[dict[str, Any]] = [
        {"controls": {"canny": Control(picture(k), scale, end=0.7), "edges": picture(k + 9)}}
        for k, scale in enumerate((0.7, -0.3, 1.0))
    ]
    for i, latents in enumerate(joined(pipe, requests)):
        single = pipe.generate(PROMPT, seed=i, **QUICK, **requests[i]).latents
        assert relative_error(latents, single) <= 1e-5
    keys = [
        pipe.request(PROMPT, controls=controls).in_common
        for controls in (
            None,
            {"canny": picture(1)},
            {"depth": picture(1)},
            {"canny": Control(picture(1), end=0.7)},
            {"canny": picture(1), "depth": picture(1)},
        )
    ]
    assert len(set(keys)) == len(keys)


def test_off_it_leaves_no_trace(pipe: Pipeline, mini_bundle: Path) -> None:
    before = pipe.generate(PROMPT, seed=5, **QUICK).latents
    controlled = pipe.generate(PROMPT, seed=5, **QUICK, controls={"canny": picture(1)}).latents
    assert relative_error(controlled, before) > 0.05
    none = {"canny": Control(picture(1), scale=0.0)}
    assert np.array_equal(pipe.generate(PROMPT, seed=5, **QUICK, controls=none).latents, before)
    assert np.array_equal(pipe.generate(PROMPT, seed=5, **QUICK).latents, before)
    with Pipeline.load(mini_bundle) as plain:
        assert relative_error(before, plain.generate(PROMPT, seed=5, **QUICK).latents) <= 1e-5


def test_image_to_image(pipe: Pipeline, mini_bundle: Path) -> None:
    """A picture that is drawn from is taken as in other bundles; shares are of the steps left."""
    start = {"image": picture(4), "strength": 0.8, "seed": 3}
    options = {name: value for name, value in QUICK.items() if name != "size"}
    with Pipeline.load(mini_bundle) as plain:
        both = [own.generate(PROMPT, **options, **start).latents for own in (pipe, plain)]
    assert relative_error(*both) <= 1e-5
    seen = []
    controls = {"canny": Control(picture(1), start=0.5)}
    for own in (None, controls):
        steps: list[np.ndarray] = []
        pipe.generate(
            PROMPT, **options, **start, controls=own,
            callback=lambda step, steps=steps: steps.append(step.latents.copy()),
        )  # fmt: skip
        seen.append(steps)
    differs = [not np.array_equal(*pair) for pair in zip(*seen, strict=True)]
    assert differs == [False, False, True, True]


def test_pool(bundle: Path, pipe: Pipeline) -> None:
    with PipelinePool({"own": bundle}) as pool:
        controls = {"depth": Control(picture(2), 0.5)}
        tickets = [pool.submit(PROMPT, seed=i, **QUICK, controls=controls) for i in range(2)]
        for i, ticket in enumerate(tickets):
            single = pipe.generate(PROMPT, seed=i, **QUICK, controls=controls).latents
            assert relative_error(ticket.result().latents, single) <= 1e-5


@pytest.mark.nightly
def test_with_every_feature(make_bundle: Callable[..., Path], nets: dict[str, Path]) -> None:
    """Adapters, inpainting and skip-layer guidance: each is off where it is not asked for."""
    features = {"adapters": 16, "inpainting": True, "skip_layer_guidance": True}
    nets = {"canny": nets["canny"]}
    few = make_bundle(**net_options(nets))
    every = make_bundle(**net_options(nets), **features)
    mask = np.zeros((SIZE[1], SIZE[0]), bool)
    mask[16:48, 16:48] = True
    source = {"image": picture(4), "mask": mask, "strength": 1.0}
    skip = {"skip_guidance_layers": [1, 3], "skip_layer_guidance_stop": 0.7}
    options = {"seed": 3, "controls": {"canny": picture(1)}, **QUICK}
    with Pipeline.load(every) as more, Pipeline.load(few) as less:
        both = [own.generate(PROMPT, **options).latents for own in (more, less)]
        assert relative_error(*both) <= 1e-5
        plain = more.generate(PROMPT, **{**options, "controls": None}, **skip, **source).latents
        drawn = more.generate(PROMPT, **options, **skip, **source).latents
    inside = mask[::8, ::8]
    assert np.array_equal(drawn[..., ~inside], plain[..., ~inside])
    assert relative_error(drawn[..., inside], plain[..., inside]) > 0.05
    assert relative_error(drawn[..., inside], both[0][..., inside]) > 0.01


# Where work is queued, and where memory is short.


@pytest.mark.parametrize("recordable", [True, False])
def test_where_work_is_queued(
    bundle: Path, pipe: Pipeline, recordable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps with and without nets are graphs of their own, in the same buffers."""
    fake = install_fake(monkeypatch)

    def queued(own: Any, component: Any, device: Any, options: Any) -> QueuedSession:
        session = QueuedSession(fake, own, component, device)
        session.recordable = recordable
        return session

    two = {"canny": Control(picture(1), end=0.8), "depth": Control(picture(2), start=0.3)}
    with Pipeline(Bundle.open(bundle), open_session=queued, device="cuda") as gpu:
        for controls in (two, None, {"edges": picture(3)}, two):
            request = {**QUICK, "steps": 10, "seed": 4, "controls": controls}
            ours, theirs = (own.generate(PROMPT, **request) for own in (gpu, pipe))
            assert np.array_equal(ours.latents, theirs.latents)
    assert ("cudaGraphLaunch" in fake.calls) is recordable


def test_within_a_budget(bundle: Path, pipe: Pipeline) -> None:
    """Nets and the denoiser are in memory together, each loaded once; idle nets take no room."""
    request: dict[str, Any] = {**QUICK, "seed": 6}
    controls = {"canny": picture(1), "edges": picture(2)}
    with pytest.raises(OutOfMemory) as caught:
        Pipeline.load(bundle, vram_budget="1MiB")
    found = re.search(r"vram_budget for it is ([\d.]+ \w+)", str(caught.value))
    assert found is not None
    least = parse_bytes(found[1])
    opened: Counter[str] = Counter()

    def counted(own: Any, component: Any, device: Any, options: Any) -> Any:
        opened[component.name] += 1
        return open_session(own, component, device, options)

    expected = pipe.generate(PROMPT, **request, controls=controls).latents
    with Pipeline(Bundle.open(bundle), open_session=counted, vram_budget=least) as own:
        assert np.array_equal(own.generate(PROMPT, **request, controls=controls).latents, expected)
        assert opened["denoiser"] == opened["control_canny"] == opened["control_edges"] == 1
        assert "control_depth" not in opened
        report = own.memory()
        assert report.planned_peak <= least


# Notes and refusals.


def test_notes_and_parameters(pipe: Pipeline) -> None:
    late = {"canny": Control(picture(1), start=0.3, end=0.35)}
    result = pipe.generate(PROMPT, **QUICK, seed=1, controls=late)
    assert result.notes == (
        "none of 5 steps is between 0.3 and 0.35: the ControlNet canny did not run",
    )
    assert np.array_equal(result.latents, pipe.generate(PROMPT, **QUICK, seed=1).latents)
    expected = {"canny": {"scale": 1.0, "start": 0.3, "end": 0.35}}
    assert result.parameters["controls"] == expected


def test_arguments(pipe: Pipeline, mini_bundle: Path, tmp_path: Path) -> None:
    own = picture(1)
    text = tmp_path / "text.png"
    text.write_text("no picture")
    refused: dict[str, tuple[Any, str]] = {
        "an unknown name": ({"cany": own}, "no ControlNet 'cany'.*this bundle has: canny, depth"),
        "a picture alone": (own, "controls must be a mapping from names to pictures"),
        "no picture": ({"canny": None}, "must be a picture, an array or a path"),
        "missing": ({"canny": tmp_path / "no.png"}, "no.png is missing"),
        "unreadable": ({"canny": text}, "is not a readable picture"),
        "another array": ({"canny": own[..., 0]}, r"not uint8 \[height, width, 3\]"),
        "no number": ({"canny": Control(own, "much")}, "must be a number"),  # type: ignore[arg-type]
        "NaN": ({"canny": Control(own, float("nan"))}, "must be -100 to 100"),
        "too large": ({"canny": Control(own, 101)}, "must be -100 to 100"),
        "late": ({"canny": Control(own, end=1.2)}, "end of .* must be 0 to 1"),
        "never": ({"canny": Control(own, start=0.5, end=0.5)}, "let it start before it ends"),
        "edges of depth": ({"depth": Control(own, edges=True)}, "depth takes no edges"),
    }
    for case, (controls, message) in refused.items():
        with pytest.raises(UsageError, match=message) as caught:
            pipe.request(PROMPT, controls=controls)
        assert len(str(caught.value).splitlines()) == 1, case
    advice = "build the bundle with: --controlnet NAME=DIR"
    with Pipeline.load(mini_bundle) as plain, pytest.raises(UsageError, match=advice):
        plain.request(PROMPT, controls={"canny": own})


def test_edges(pipe: Pipeline) -> None:
    pytest.importorskip("cv2", reason="the extra control is not installed")
    disc = np.zeros((64, 128, 3), np.uint8)
    disc[16:48, 32:96] = 255
    (use,) = pipe.request(PROMPT, size=SIZE, controls={"canny": Control(disc, edges=True)}).controls
    assert set(np.unique(use.pictures)) == {0, 255}
    assert 0 < (use.pictures > 0).mean() < 0.1
    assert not use.pictures[0, 28:36, 60:68].any()


def test_edges_need_an_extra(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(Exception, match=r"finding edges needs cv2.*sd35-trt\[control\]"):
        pipe.request(PROMPT, controls={"canny": Control(picture(1), edges=True)})


def test_a_fallback_has_the_nets(bundle: Path, mini_bundle: Path) -> None:
    with pytest.raises(BundleError, match="has no ControlNet canny, depth, edges"):
        Pipeline.load(bundle, fallback=mini_bundle)


def test_fp8_needs_scales_of_the_nets(nets: dict[str, Path], tmp_path: Path) -> None:
    given = net_options({"own": nets["canny"]})
    with pytest.raises(UsageError, match="the ControlNet own in FP8, and the calibration has no"):
        build(BuildOptions(policy="fp8", out=tmp_path / "bundle", **given))


def test_the_packaged_scales_are_of_the_packaged_net(nets: dict[str, Path], tmp_path: Path) -> None:
    given = net_options({"canny": nets["canny"]})
    message = r"is of another checkpoint \(control_canny/.* differs\)"
    with pytest.raises(UsageError, match=message):
        build(BuildOptions(policy="fp8", out=tmp_path / "bundle", **given))


def altered(manifest: Manifest, **values: Any) -> Manifest:
    return replace(manifest, **values)


def test_contract(bundle: Path) -> None:
    m = Bundle.open(bundle).manifest
    assert m.requires == ("control",)
    assert m.features.control_blocks == 2
    assert [(c.name, c.kind) for c in m.controls] == [
        ("canny", "canny"), ("depth", "depth"), ("edges", "canny"),
    ]  # fmt: skip
    check_contract(m, "b")
    net = m.component("control_canny")
    assert net is not None
    half = tuple(
        replace(port, dtype="float16") if port.name == "residuals" else port for port in net.inputs
    )
    others = [c for c in m.components if c.name != "control_canny"]
    faults: dict[str, Manifest] = {
        "control_canny": altered(m, components=tuple(others)),
        "requires": altered(m, controls=()),
        "two ControlNets canny": altered(m, controls=(*m.controls, m.controls[0])),
        "is no ControlNet's name": altered(
            m, controls=(*m.controls, replace(m.controls[0], name="Canny"))
        ),
        "of no ControlNet that it lists": altered(m, controls=m.controls[1:]),
        "takes another": altered(m, components=(*others, replace(net, inputs=half))),
        "has no input residuals": altered(
            m,
            components=tuple(
                replace(c, inputs=tuple(p for p in c.inputs if p.name != "residuals"))
                if c.name == "denoiser"
                else c
                for c in m.components
            ),
        ),
    }
    for message, manifest in faults.items():
        with pytest.raises(BundleError, match=re.escape(message)):
            check_contract(manifest, "b")
