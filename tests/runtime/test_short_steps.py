"""Short steps: as plain PyTorch draws them, whatever else a request has, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_files import diffusers_names, random_layers, write
from against_diffusers import PROMPT, SEED, encoder_mean, load_diffusers
from conftest import psnr, relative_error
from control_nets import every_feature
from diffusers import (
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
)
from fake_gpu import QueuedSession, install_fake
from msgspec.structs import replace
from originals import part_tensors
from PIL import Image
from short_step_blocks import Kind, short_steps

from sd35_trt.checkpoints.adapter_convert import convert_adapter
from sd35_trt.errors import BundleError, Cancelled, UsageError
from sd35_trt.formats.adapter import write_adapter
from sd35_trt.formats.bundle import Bundle, Manifest
from sd35_trt.formats.contract import check_contract
from sd35_trt.formats.step_cache import STEP_CACHE, StepCache, StepPlan, transformer_files
from sd35_trt.mini import checkpoint_path
from sd35_trt.quality.engines import compare_engines
from sd35_trt.runtime import Control, Pipeline, PipelinePool, Step
from sd35_trt.runtime.job import Job, Result
from sd35_trt.runtime.short_steps import SCRATCH, PlannedStep, StepKinds, planned_steps

FIRST_BLOCKS = 2
T5_TOKENS = 32
SIZE = (64, 64)
COPY, LINE = (1.0, 0.0), (1.5, -0.5)
COEFFICIENTS = (None, None, COPY, LINE, None, LINE, None, COPY)
STEPS = len(COEFFICIENTS)
QUICK: dict[str, Any] = {"steps": STEPS, "guidance": 3.0, "t5_tokens": T5_TOKENS}
PEER: dict[str, Any] = {
    "num_inference_steps": STEPS, "guidance_scale": 3.0, "max_sequence_length": T5_TOKENS,
    "output_type": "latent",
}  # fmt: skip
FULL, LOST = Kind(), Kind(remembered=False)
KINDS = [FULL if pair is None else Kind(pair) for pair in COEFFICIENTS]


def write_step_cache(path: Path, bundle: Path, first_blocks: int, blocks: int) -> Path:
    """Of plans for both samplers, with the shift of most models."""
    plans = tuple(
        StepPlan(steps=STEPS, sampler=sampler, shift=3.0, coefficients=COEFFICIENTS, error=0.1)
        for sampler in ("euler", "dpmpp-2m")
    )
    files = transformer_files(Bundle.open(bundle).manifest.model.files)
    cache = StepCache(short_blocks=first_blocks, blocks=blocks, files=files, plans=plans)
    path.write_bytes(cache.encode())
    return path


@pytest.fixture(scope="module")
def step_cache(mini_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / STEP_CACHE
    return write_step_cache(path, mini_bundle, FIRST_BLOCKS, 6)


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path], step_cache: Path) -> Path:
    """Mini in FP32, with short steps alone."""
    return make_bundle(step_cache=step_cache)


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(bundle) as loaded:
        yield loaded


@dataclass(frozen=True)
class Rich:
    """Mini in FP32, with short steps and all else.

    Attributes:
        nets: of the folder's ControlNets, their models.
        lora: that the pipeline knows as ``style``.
    """

    pipe: Pipeline
    nets: dict[str, Path]
    lora: Path


@pytest.fixture(scope="module")
def rich(
    make_bundle: Callable[..., Path], step_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rich]:
    folder = tmp_path_factory.mktemp("rich")
    options = every_feature(folder)
    root = make_bundle(step_cache=step_cache, **options)
    base = part_tensors(checkpoint_path(), "transformer")
    names = [f"transformer_blocks.{k}.{own}" for k in range(6)
             for own in ("attn.to_q", "attn.to_v", "ff.net.2")]  # fmt: skip
    layers = random_layers(base, names, 4, None, 1)
    (folder / "lora").mkdir()
    lora = write(folder / "lora" / "style.safetensors", diffusers_names("transformer", layers))
    adapter = folder / "adapter.safetensors"
    write_adapter(adapter, convert_adapter(lora, Bundle.open(root)))
    with Pipeline.load(root) as loaded:
        loaded.load_adapter("style", adapter)
        yield Rich(loaded, {n: folder / n for n in ("canny", "depth")}, lora)


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)


def draw(peer: Any, first_blocks: int, kinds: list[Kind], **options: Any) -> np.ndarray:
    """Latents of diffusers' pipeline, whose steps are of these kinds."""
    peer.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(SEED)
    with short_steps(peer.transformer, first_blocks, kinds), encoder_mean(peer):
        drawn = peer(PROMPT, generator=generator, **{**PEER, **options})
        latents: np.ndarray = drawn.images.numpy()
    return latents


@pytest.fixture(scope="module")
def peer() -> Any:
    return load_diffusers(checkpoint_path())


SIDES = {"width": SIZE[0], "height": SIZE[1]}


def fast(pipe: Pipeline, **options: Any) -> Result:
    return pipe.generate(PROMPT, seed=SEED, step_cache="fast", **QUICK, **options)


def test_as_plain_pytorch_draws_them(pipe: Pipeline, peer: Any) -> None:
    result = fast(pipe, size=SIZE)
    assert result.short_steps == 4
    assert result.parameters["step_cache"] == "fast"
    assert relative_error(result.latents, draw(peer, 2, KINDS, **SIDES)) <= 1e-3
    exact = pipe.generate(PROMPT, seed=SEED, size=SIZE, **QUICK)
    assert exact.short_steps == 0
    assert relative_error(result.latents, exact.latents) > 0.01, "short steps are others"


def test_of_full_steps_a_picture_is_the_plain_bundles(pipe: Pipeline, mini_bundle: Path) -> None:
    options: dict[str, Any] = {"seed": SEED, "size": SIZE, "batch": 2, **QUICK}
    with Pipeline.load(mini_bundle) as plain:
        expected = plain.generate(PROMPT, **options)
    actual = pipe.generate(PROMPT, **options)
    assert relative_error(actual.latents, expected.latents) <= 1e-5
    assert psnr(actual.images, expected.images) >= 60


@pytest.mark.nightly
@pytest.mark.parametrize(("structure", "blocks"), [("large", 3), ("medium", 4)])
@pytest.mark.parametrize("first_blocks", [1, 2])
def test_other_structures(
    structure: str,
    blocks: int,
    first_blocks: int,
    make_bundle: Callable[..., Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """One attention per block, and two in the first blocks."""
    plain = request.getfixturevalue(f"{structure}_bundle")
    checkpoint = request.getfixturevalue(f"{structure}_checkpoint")
    path = write_step_cache(tmp_path / STEP_CACHE, plain, first_blocks, blocks)
    root = make_bundle(model=str(checkpoint), step_cache=path)
    with Pipeline.load(root) as pipe:
        latents = fast(pipe, size=SIZE, batch=1).latents
    expected = draw(load_diffusers(checkpoint), first_blocks, KINDS, **SIDES)
    assert relative_error(latents, expected) <= 1e-3


# Beside what else a request has.


def test_with_adapters(rich: Rich) -> None:
    peer = load_diffusers(checkpoint_path())
    lora = rich.lora
    peer.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name="style")
    peer.set_adapters(["style"], [0.7])
    result = fast(rich.pipe, size=SIZE, adapters={"style": 0.7})
    assert relative_error(result.latents, draw(peer, 2, KINDS, **SIDES)) <= 1e-3


def test_a_third_branch_makes_a_step_a_full_one(rich: Rich, peer: Any) -> None:
    skip: dict[str, Any] = {
        "skip_guidance_layers": [1, 3],
        "skip_layer_guidance_scale": 2.0,
        "skip_layer_guidance_start": 0.01,
        "skip_layer_guidance_stop": 0.45,
    }
    kinds = [FULL, FULL, LOST, LOST, *KINDS[4:]]
    result = fast(rich.pipe, size=SIZE, **skip)
    assert result.short_steps == 2
    assert relative_error(result.latents, draw(peer, 2, kinds, **SIDES, **skip)) <= 1e-3


def test_image_to_image_begins_with_full_steps(rich: Rich, peer: Any) -> None:
    """Three of eight steps are left out, and with them one of the two that a short one needs."""
    painter = StableDiffusion3Img2ImgPipeline(**peer.components)
    options = {"image": Image.fromarray(picture()), "strength": 0.625}
    kinds = [LOST, FULL, LOST, FULL, Kind(COPY)]
    result = fast(rich.pipe, **options)
    assert result.short_steps == 1
    assert relative_error(result.latents, draw(painter, 2, kinds, **SIDES, **options)) <= 1e-3


def test_inpainting(rich: Rich, peer: Any) -> None:
    painter = StableDiffusion3InpaintPipeline(**peer.components)
    mask = np.zeros(SIZE, bool)
    mask[:, 24:] = True
    drawn, image = Image.fromarray(mask), Image.fromarray(picture())
    expected = draw(
        painter, 2, KINDS, image=image, mask_image=drawn, strength=1.0, **SIDES
    )  # fmt: skip
    result = fast(rich.pipe, image=image, mask=mask, strength=1.0)
    assert result.short_steps == 4
    assert relative_error(result.latents, expected) <= 1e-3


@pytest.mark.parametrize(
    ("end", "kinds"),
    [
        (1.0, KINDS),
        (0.375, [FULL, FULL, Kind(COPY), LOST, FULL, LOST, FULL, Kind(COPY)]),
    ],
    ids=["in all steps", "in the first three"],
)
def test_with_controlnets(rich: Rich, peer: Any, end: float, kinds: list[Kind]) -> None:
    """Where a net ends, steps are full ones until two are remembered without it."""
    net = SD3ControlNetModel.from_pretrained(rich.nets["depth"])
    parts = {k: v for k, v in peer.components.items() if k != "controlnet"}
    painter = StableDiffusion3ControlNetPipeline(**parts, controlnet=net)
    expected = draw(
        painter, 2, kinds, control_image=Image.fromarray(picture(3)), negative_prompt="",
        controlnet_conditioning_scale=0.8, control_guidance_end=end, **SIDES,
    )  # fmt: skip
    controls = {"depth": Control(picture(3), 0.8, 0.0, end)}
    result = fast(rich.pipe, size=SIZE, controls=controls)
    assert result.short_steps == sum(kind.coefficients is not None for kind in kinds)
    assert relative_error(result.latents, expected) <= 1e-3


# Which steps are short.


def test_two_full_steps_of_the_plan_come_first() -> None:
    kinds = StepKinds([False] * STEPS, [()] * STEPS)
    steps = planned_steps(COEFFICIENTS, kinds)
    assert [step.coefficients for step in steps] == list(COEFFICIENTS)
    assert [step.slot for step in steps] == [0, 1, 1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize("left_out", range(1, STEPS))
def test_what_is_read_is_what_the_plan_means(left_out: int) -> None:
    """Of every end of the plan, a short step's slots hold its two last full steps' changes."""
    count = STEPS - left_out
    steps = planned_steps(COEFFICIENTS, StepKinds([False] * count, [()] * count))
    slots: dict[int, int] = {}
    for number, step in enumerate(steps, left_out):
        if step.coefficients is None:
            slots[step.slot] = number
            continue
        full = [k for k in range(number) if COEFFICIENTS[k] is None][-2:]
        assert [slots[1 - step.slot], slots[step.slot]] == full
    assert bool(steps) == (left_out <= 4)


def test_without_a_short_step_there_is_no_plan() -> None:
    third = [False, False, *[True] * (STEPS - 2)]
    assert planned_steps(COEFFICIENTS, StepKinds(third, [()] * STEPS)) == ()
    nets = [(number,) for number in range(STEPS)]
    assert planned_steps(COEFFICIENTS, StepKinds([False] * STEPS, nets)) == ()


def test_what_another_net_was_in_is_not_extrapolated() -> None:
    nets = [(number < 3,) for number in range(STEPS)]
    steps = planned_steps(COEFFICIENTS, StepKinds([False] * STEPS, nets))
    assert steps[2] == PlannedStep(COPY, 1)
    assert [step.slot for step in steps[3:]] == [SCRATCH, 0, SCRATCH, 1, 1]
    assert steps[-1].coefficients == COPY


# Requests.


def test_without_a_plan_a_request_is_exact_with_a_note(pipe: Pipeline) -> None:
    for options in ({"steps": 3}, {"steps": STEPS, "shift": 2.0}):
        quick: dict[str, Any] = {"seed": SEED, "size": SIZE, "t5_tokens": T5_TOKENS, **options}
        result = pipe.generate(PROMPT, step_cache="fast", **quick)
        (note,) = result.notes
        assert note.startswith(f"the step cache has no plan for {options['steps']} steps of euler")
        assert result.short_steps == 0
        assert np.array_equal(result.latents, pipe.generate(PROMPT, **quick).latents)


def test_of_few_steps_of_a_picture_none_is_short(pipe: Pipeline) -> None:
    result = fast(pipe, image=picture(), strength=0.3)
    assert result.notes == ("none of 3 steps could be short: every step was a full one",)


def test_another_bundle_refuses(mini_bundle: Path) -> None:
    with Pipeline.load(mini_bundle) as plain:
        with pytest.raises(UsageError, match="built without short steps — leave out step_cache"):
            plain.generate(PROMPT, step_cache="fast")
        with pytest.raises(UsageError, match="unknown step_cache 'quick' — use one of: fast"):
            plain.generate(PROMPT, step_cache="quick")


def test_joined_requests_have_the_same_short_steps(pipe: Pipeline) -> None:
    options: dict[str, Any] = {"size": SIZE, **QUICK}
    alone = [pipe.generate(PROMPT, seed=s, step_cache="fast", **options).latents for s in (1, 2)]
    jobs = [Job(pipe.request(PROMPT, seed=s, step_cache="fast", **options)) for s in (1, 2)]
    assert jobs[0].request.in_common == jobs[1].request.in_common
    pipe.draw(jobs)
    for job, latents in zip(jobs, alone, strict=True):
        assert isinstance(job.outcome, Result), job.outcome
        assert relative_error(job.outcome.latents, latents) <= 1e-5
    exact = pipe.request(PROMPT, **options)
    assert exact.in_common != jobs[0].request.in_common
    # Without a plan, it is one like others.
    options["steps"] = 3
    assert pipe.request(PROMPT, step_cache="fast", **options).in_common == (
        pipe.request(PROMPT, **options).in_common
    )


def test_a_pool_draws_both(bundle: Path, pipe: Pipeline) -> None:
    options: dict[str, Any] = {"size": SIZE, "seed": SEED, **QUICK}
    kinds = ("exact", "fast", "fast", "exact")
    with PipelinePool({"short": bundle}) as pool:
        tickets = [pool.submit(PROMPT, step_cache=kind, **options) for kind in kinds]
        results = [ticket.result() for ticket in tickets]
    for kind, result in zip(kinds, results, strict=True):
        expected = pipe.generate(PROMPT, step_cache=kind, **options)
        assert relative_error(result.latents, expected.latents) <= 1e-5
        assert result.short_steps == expected.short_steps


def test_recorded_steps_draw_the_same(
    bundle: Path, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs of both engines, of both turns and of each place of a change."""
    fake = install_fake(monkeypatch)
    options: dict[str, Any] = {"size": SIZE, "seed": SEED, **QUICK}
    expected = {
        kind: pipe.generate(PROMPT, step_cache=kind, **options).latents
        for kind in ("fast", "exact")
    }

    def recordable(own: Any, component: Any, device: Any, options: Any) -> QueuedSession:
        return QueuedSession(fake, own, component, device)

    with Pipeline(Bundle.open(bundle), open_session=recordable, device="cuda") as recorded:
        for kind in ("fast", "exact", "fast", "fast", "exact"):
            result = recorded.generate(PROMPT, step_cache=kind, **options)
            assert np.array_equal(result.latents, expected[kind]), kind


# What a manifest has to state.


def altered(manifest: Manifest, component: str, **changes: Any) -> Manifest:
    """With other fields of a component."""
    components = tuple(
        replace(c, **changes) if c.name == component else c for c in manifest.components
    )
    return replace(manifest, components=components)


def test_what_does_not_fit_together_is_refused(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    check_contract(manifest, bundle)
    full, short = manifest.component("denoiser"), manifest.component("denoiser_short")
    assert full is not None
    assert short is not None
    others = tuple(c for c in manifest.components if c != short)
    narrow = tuple(
        replace(p, dtype="float16") if p.name == "last_change" else p for p in short.inputs
    )
    silent = tuple(port for port in full.outputs if port.name != "change")
    wrong = {
        "has no denoiser_short": replace(manifest, components=others),
        "denoiser has no output change": altered(manifest, "denoiser", outputs=silent),
        "takes last_change in float16, the denoiser has it in float32": altered(
            manifest, "denoiser_short", inputs=narrow
        ),
        "compute no block": replace(manifest, short_steps=0),
        "a denoiser_short and no short steps": replace(manifest, requires=()),
    }
    for reason, other in wrong.items():
        with pytest.raises(BundleError, match=reason):
            check_contract(other, bundle)


def test_engines_are_compared_with_their_graphs(bundle: Path) -> None:
    """Whatever the step cache says: that of short steps too."""
    graphs = {c.name: bundle / c.files[0].path for c in Bundle.open(bundle).manifest.components}
    comparison = compare_engines(Bundle.open(bundle), graphs, steps=1)
    assert comparison.passed
    ports = {(port.component, port.port) for port in comparison.ports}
    assert {("denoiser", "change"), ("denoiser_short", "next_latents")} <= ports


# By every builder and in every precision.


def step_error(bundle: Path, truth: dict[str, np.ndarray], kind: str) -> float:
    """Of the latents after the third step, which is short in a fast request."""
    seen: list[np.ndarray] = []

    def watch(step: Step) -> bool:
        seen.append(step.latents.copy())
        return len(seen) < 3

    with Pipeline.load(bundle, device="cpu") as pipe, pytest.raises(Cancelled):
        pipe.generate(PROMPT, seed=SEED, size=SIZE, step_cache=kind, callback=watch, **QUICK)
    truth.setdefault(kind, seen[-1])
    return relative_error(seen[-1], truth[kind])


@pytest.mark.nightly
@pytest.mark.parametrize("builder", ["onnxruntime", "inductor"])
def test_in_every_precision(
    builder: str, make_bundle: Callable[..., Path], step_cache: Path, bundle: Path
) -> None:
    """A short step is hardly further from FP32's than a full one is."""
    truth: dict[str, np.ndarray] = {}
    assert [step_error(bundle, truth, kind) for kind in ("fast", "exact")] == [0, 0]
    target = {"onnxruntime": "cpu", "inductor": "h200"}[builder]
    options: dict[str, Any] = {"target": target, "builder": builder, "step_cache": step_cache}
    policies = ["fp32", "half", "fp8", *(["int8-weight"] if builder == "onnxruntime" else [])]
    for policy in policies:
        narrow = make_bundle(policy=policy, **options)
        short, full = (step_error(narrow, truth, kind) for kind in ("fast", "exact"))
        assert short <= 1.5 * full + 1e-5, policy
        if policy == "fp32":
            assert short <= 1e-4


@pytest.mark.nightly
def test_without_guidance(make_bundle: Callable[..., Path], step_cache: Path, peer: Any) -> None:
    with Pipeline.load(make_bundle(guidance=False, step_cache=step_cache)) as pipe:
        options: dict[str, Any] = {**QUICK, "guidance": 1.0}
        result = pipe.generate(PROMPT, seed=SEED, size=SIZE, step_cache="fast", **options)
    expected = draw(peer, 2, KINDS, **SIDES, guidance_scale=1.0)
    assert result.short_steps == 4
    assert relative_error(result.latents, expected) <= 1e-3


def test_within_a_budget(bundle: Path, pipe: Pipeline) -> None:
    """The engine of short steps is planned for where steps are short."""
    options: dict[str, Any] = {"size": SIZE, "seed": SEED, **QUICK}
    expected = pipe.generate(PROMPT, step_cache="fast", **options).latents
    with Pipeline.load(bundle, vram_budget="64MB") as limited:
        limited.generate(PROMPT, **options)
        exact = limited.memory().planned_peak
        assert not limited.memory().engines["denoiser_short"].open
        result = limited.generate(PROMPT, step_cache="fast", **options)
        assert limited.memory().planned_peak > exact
        assert np.array_equal(result.latents, expected)
