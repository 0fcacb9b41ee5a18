"""One picture by two devices: as one draws it, what they exchange, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from adapter_files import diffusers_names, random_layers, write
from conftest import one_error_line, relative_error
from control_nets import net_options, write_mini_nets
from fake_cuda import FakeCuda
from fake_engines import same
from fake_gpu import QueuedSession, install_fake
from originals import part_tensors

from sd35_trt.checkpoints.adapter_convert import convert_adapter
from sd35_trt.components import BRANCH_DENOISER, COMBINE
from sd35_trt.errors import BundleError, UsageError
from sd35_trt.formats.adapter import write_adapter
from sd35_trt.formats.bundle import Bundle
from sd35_trt.mini import checkpoint_path
from sd35_trt.runtime import Control, Pipeline, PipelinePool, Step, second_device
from sd35_trt.runtime.job import Job

QUICK: dict[str, Any] = {"steps": 4, "size": (64, 64)}

# Guidance of what was denoised rounds otherwise than that of velocities.
EQUAL = 1e-5


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mini in FP32, for two devices, with all that this goes with."""
    nets = write_mini_nets(tmp_path_factory.mktemp("nets"))
    return make_bundle(split_guidance=True, inpainting=True, adapters=16, **net_options(nets))


@pytest.fixture(scope="module")
def one(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(bundle, threads=1) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def two(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(bundle, threads=1, device="cpu,cpu") as pipe:
        yield pipe


def on_gpus(bundle: Path, fake: FakeCuda, **arguments: Any) -> Pipeline:
    def open_session(bundle: Any, component: Any, device: Any, options: Any) -> QueuedSession:
        return QueuedSession(fake, bundle, component, device)

    return Pipeline(Bundle.open(bundle), open_session=open_session, **arguments)


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)


def mask() -> np.ndarray:
    half = np.zeros((64, 64), bool)
    half[:, 32:] = True
    return half


REQUESTS: tuple[dict[str, Any], ...] = (
    {"prompt": "a red star", "seed": 3},
    {"prompt": ["two blue squares", "a ring"], "seed": 5, "negative": "red", "guidance": 6.0},
    {"prompt": "a red star", "seed": 3, "sampler": "dpmpp-2m", "size": (128, 64)},
    {"prompt": "a red star", "seed": 3, "guidance": 1.0, "t5_tokens": 64},
    {"prompt": "a red star", "seed": 3, "image": picture(), "strength": 0.7, "size": None},
    {"prompt": "a ring", "seed": 4, "image": picture(), "mask": mask(), "size": None},
    {"prompt": "a ring", "seed": 4, "controls": {"canny": picture()}},
    {
        "prompt": ["a ring", "a star"], "seed": 4,
        "controls": {"canny": Control(picture(), end=0.6), "depth": Control(picture(), 0.5)},
    },
)  # fmt: skip


@pytest.mark.parametrize("request_", REQUESTS)
def test_two_devices_draw_what_one_draws(
    one: Pipeline, two: Pipeline, request_: dict[str, Any]
) -> None:
    expected, found = (pipe.generate(**QUICK | request_) for pipe in (one, two))
    assert relative_error(found.latents, expected.latents) < EQUAL
    assert np.abs(found.images.astype(int) - expected.images).max() <= 1
    assert found.notes == expected.notes


# What rounds otherwise moves a quantized value to its neighbour.
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"model": "large"}, EQUAL),
        ({"model": "medium"}, EQUAL),
        ({"policy": "half"}, 0.01),
        ({"policy": "fp8"}, 0.05),
        ({"policy": "fp8", "target": "h200", "builder": "inductor"}, 0.05),
        ({"target": "h200", "builder": "inductor", "policy": "fp32"}, EQUAL),
    ],
)
def test_other_models_policies_and_engines(
    make_bundle: Callable[..., Path], request: pytest.FixtureRequest, options: dict[str, Any],
    bound: float,
) -> None:  # fmt: skip
    if "model" in options:
        options = {"model": str(request.getfixturevalue(f"{options['model']}_checkpoint"))}
    bundle = make_bundle(split_guidance=True, **options)
    latents = []
    for device in ("cpu", "cpu,cpu"):
        with Pipeline.load(bundle, threads=1, device=device) as pipe:
            latents.append(pipe.generate("a red star", seed=3, **QUICK).latents)
    assert relative_error(latents[1], latents[0]) < bound


def test_adapters(one: Pipeline, two: Pipeline, tmp_path: Path) -> None:
    root = checkpoint_path()
    base = part_tensors(root, "transformer")
    names = [
        name.removesuffix(".weight")
        for name in base
        if name.endswith((".attn.to_q.weight", ".ff.net.2.weight"))
    ]
    lora = write(
        tmp_path / "lora.safetensors",
        diffusers_names("transformer", random_layers(base, names, 4, None, 1)),
    )
    adapter = tmp_path / "adapter.safetensors"
    write_adapter(adapter, convert_adapter(lora, one.bundle))
    arguments = {**QUICK, "seed": 3, "adapters": {str(adapter): 1.0}}
    expected, found = (pipe.generate("a red star", **arguments) for pipe in (one, two))
    plain = one.generate("a red star", seed=3, **QUICK)
    assert relative_error(expected.latents, plain.latents) > 100 * EQUAL, "the adapter does much"
    assert relative_error(found.latents, expected.latents) < EQUAL


def test_joined_requests_callbacks_and_cancelling(one: Pipeline, two: Pipeline) -> None:
    seen: dict[str, list[np.ndarray]] = {"one": [], "two": []}
    expected = one.generate(
        "a ring", seed=8, callback=lambda s: seen["one"].append(s.denoised.copy()), **QUICK
    )

    def stop(step: Step) -> bool:
        return step.index < 1

    stopped = Job(two.request("a red star", seed=2, **QUICK), stop)
    kept = Job(
        two.request("a ring", seed=8, **QUICK), lambda s: seen["two"].append(s.denoised.copy())
    )
    two.draw([stopped, kept])
    assert "cancelled after step 2" in str(stopped.outcome)
    assert relative_error(kept.outcome.latents, expected.latents) < EQUAL  # type: ignore[union-attr]
    assert len(seen["two"]) == len(seen["one"]) == QUICK["steps"]
    for mine, theirs in zip(seen["two"], seen["one"], strict=True):
        assert relative_error(mine, theirs) < EQUAL


def test_both_hold_a_branch_and_neither_the_whole(bundle: Path) -> None:
    with Pipeline.load(bundle, threads=1, device="cpu,cpu") as pipe:
        pipe.preload()
        report = pipe.memory()
        assert report.second is not None
        assert list(report.second.engines) == [BRANCH_DENOISER, COMBINE]
        assert "denoiser" not in report.engines
        assert report.engines[BRANCH_DENOISER].open
        assert report.second.engines[BRANCH_DENOISER].open
        assert pipe.device == "cpu,cpu"
    with Pipeline.load(bundle, threads=1) as pipe:
        assert BRANCH_DENOISER not in pipe.memory().engines
        assert pipe.memory().second is None


def test_a_pool_of_pairs(bundle: Path, two: Pipeline) -> None:
    expected = two.generate("a red star", seed=3, **QUICK)
    with PipelinePool({"a": bundle}, devices=["cpu,cpu", "cpu,cpu"], threads=1) as pool:
        futures = [pool.submit("a red star", seed=3, **QUICK) for _ in range(3)]
        for future in futures:
            same(future.result(), expected)


def test_graphs_and_copies_of_two_gpus(
    bundle: Path, two: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams of the fake are as late as they may be: an event that lacks shows in the picture."""
    fake = install_fake(monkeypatch, devices=2)
    requests = [
        {"prompt": "a red star", "seed": 3, "steps": 6},
        {"prompt": "a ring", "seed": 4, "steps": 5},
        {"prompt": ["a ring", "a star"], "seed": 5, "steps": 5},
        {"prompt": "a red star", "seed": 3, "steps": 6, "t5_tokens": 64},
        {"prompt": "a ring", "seed": 4, "image": picture(), "mask": mask(), "size": None},
        {
            "prompt": "a ring",
            "seed": 4,
            "steps": 6,
            "controls": {"canny": Control(picture(), end=0.7)},
        },
    ]
    with on_gpus(bundle, fake, device="cuda:0,cuda:1") as pipe:
        for request in requests:
            expected = two.generate(**QUICK | request)
            found = pipe.generate(**QUICK | request)
            np.testing.assert_array_equal(found.latents, expected.latents)
            np.testing.assert_array_equal(found.images, expected.images)
        assert fake.calls.count("cudaGraphLaunch") > 20
        copies = fake.calls.count("cudaMemcpyPeerAsync")
        pipe.generate("a ring", seed=4, **QUICK)
        # The text once; in each step the time, and a branch from each to the other.
        assert fake.calls.count("cudaMemcpyPeerAsync") - copies == 1 + 3 * QUICK["steps"]
    assert {kind: count for kind, count in fake.alive.items() if count} in ({}, {"stream": 2})
    assert fake.used == 0


def test_what_is_watched_on_two_gpus(
    bundle: Path, two: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = install_fake(monkeypatch, devices=2)

    def watched(pipe: Pipeline) -> list[np.ndarray]:
        seen: list[np.ndarray] = []
        pipe.generate(
            "a ring", seed=8, callback=lambda s: seen.append(s.denoised.copy()),
            **QUICK | {"steps": 6},
        )  # fmt: skip
        return seen

    with on_gpus(bundle, fake, device="cuda:0,cuda:1") as pipe:
        for mine, theirs in zip(watched(pipe), watched(two), strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
    ("devices", "peers", "words"),
    [
        (1, set(), "cuda:0 draws alone: there is no cuda:1"),
        (2, {(0, 1)}, "cuda:0 draws alone: copies between it and cuda:1 do not go directly"),
    ],
)
def test_the_first_gpu_draws_where_the_second_cannot(
    bundle: Path, one: Pipeline, monkeypatch: pytest.MonkeyPatch,
    devices: int, peers: set[tuple[int, int]], words: str,
) -> None:  # fmt: skip
    fake = install_fake(monkeypatch, devices=devices)
    fake.peers = peers
    lines: list[str] = []
    monkeypatch.setattr(
        second_device,
        "logger",
        SimpleNamespace(warning=lambda *args: lines.append(args[0] % args[1:])),
    )
    with on_gpus(bundle, fake, device="cuda:0,cuda:1") as pipe:
        assert len(lines) == 1
        assert words in lines[0]
        assert pipe.device == "cuda:0"
        found = pipe.generate("a red star", seed=3, **QUICK)
    expected = one.generate("a red star", seed=3, **QUICK)
    np.testing.assert_array_equal(found.latents, expected.latents)


def test_a_budget_is_for_each_of_them(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install_fake(monkeypatch, devices=2)
    with on_gpus(bundle, fake, device="cuda:0,cuda:1", vram_budget=1 << 30) as pipe:
        expected = pipe.generate("a red star", seed=3, **QUICK)
        report = pipe.memory()
        assert report.second is not None
        assert report.budget == report.second.budget == 1 << 30
        tight = max(report.planned_peak, report.second.planned_peak)
        assert report.second.planned_peak < report.planned_peak
    with on_gpus(bundle, fake, device="cuda:0,cuda:1", vram_budget=tight * 9 // 10) as pipe:
        for _ in range(2):
            found = pipe.generate("a red star", seed=3, **QUICK)
            np.testing.assert_array_equal(found.latents, expected.latents)


def test_what_two_devices_refuse(bundle: Path, tiny_bundle: Path, run: Any, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no denoiser of one branch .* --split-guidance"):
        Pipeline.load(tiny_bundle, device="cpu,cpu")
    for device, words in (
        ("cpu,cuda:0", "is of two kinds"),
        ("cpu,cpu,cpu", "is not two devices"),
        ("cpu,", "is not two devices"),
    ):
        with pytest.raises(UsageError, match=words):
            Pipeline.load(bundle, device=device)
    for words, wrong in (
        (("--no-guidance",), "this bundle has none — leave it out"),
        (("--skip-layer-guidance",), "needs a third — build two bundles"),
    ):
        status, _, err = run("build", "--split-guidance", *words, "--out", tmp_path / "none")
        assert status == 2
        assert wrong in one_error_line(err)


def test_the_command_line_draws_with_two(run: Any, bundle: Path, tmp_path: Path) -> None:
    words = ("generate", bundle, "a red star", "--steps", 2, "--size", "64x64", "--seed", 3)
    status, _, err = run(*words, "--device", "cpu,cpu", "--out", tmp_path / "two.png")
    assert status == 0, err
    assert (tmp_path / "two.png").exists()


def test_steps_of_one_shape_share_buffers(two: Pipeline) -> None:
    pictures = [two.generate("a red star", seed=seed, **QUICK).latents for seed in (1, 2, 1)]
    np.testing.assert_array_equal(pictures[0], pictures[2])
    assert all(np.abs(a - b).max() > 0.1 for a, b in pairwise(pictures))
