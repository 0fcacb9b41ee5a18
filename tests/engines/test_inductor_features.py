"""Bundles of programs with adapters, skip-layer guidance, inpainting and nets, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import diffusers_names, random_layers, write
from conftest import relative_error
from control_nets import net_options, write_net
from originals import part_tensors

from sd35_trt.checkpoints.adapter_convert import convert_adapter
from sd35_trt.engines import inductor
from sd35_trt.formats.adapter import write_adapter
from sd35_trt.formats.bundle import Bundle
from sd35_trt.mini import checkpoint_path
from sd35_trt.runtime import Control, Pipeline
from sd35_trt.runtime.job import Job, Result

FEATURES: dict[str, Any] = {"skip_layer_guidance": True, "inpainting": True, "adapters": 16}
PROMPT = "a small red circle to the left of a large blue square"
QUICK: dict[str, Any] = {"steps": 3, "size": (64, 64), "guidance": 3.0, "t5_tokens": 32}
MIX = {"style": 0.7}
SKIP: dict[str, Any] = {"skip_guidance_layers": [1, 3], "skip_layer_guidance_stop": 0.7}
KINDS: list[dict[str, Any]] = [{}, {"adapters": MIX}, SKIP, {"adapters": MIX, **SKIP}]


@pytest.fixture(scope="module")
def programs(make_bundle: Callable[..., Path]) -> Callable[..., Path]:
    """A bundle for a GPU that is not here."""

    def make(**options: Any) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(inductor, "present_gpu", lambda capabilities: None)
            return make_bundle(target="h200", builder="inductor", **options)

    return make


@pytest.fixture(scope="module")
def adapter(make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = part_tensors(checkpoint_path(), "transformer")
    linears = ("attn.to_q", "attn.to_v", "attn.add_k_proj", "attn.to_out.0", "ff.net.2",
               "norm1.linear")  # fmt: skip
    names = [f"transformer_blocks.{k}.{own}" for k in range(6) for own in linears]
    folder = tmp_path_factory.mktemp("lora")
    lora = write(
        folder / "lora.safetensors",
        diffusers_names("transformer", random_layers(base, names, 4, None, 1)),
    )
    path = folder / "adapter.safetensors"
    write_adapter(path, convert_adapter(lora, Bundle.open(make_bundle(**FEATURES))))
    return path


def load(bundle: Path, adapter: Path) -> Pipeline:
    pipe = Pipeline.load(bundle, device="cpu", threads=1)
    pipe.load_adapter("style", adapter)
    return pipe


def test_a_run_without_adapters_has_none(programs: Callable[..., Path]) -> None:
    manifest = Bundle.open(programs(policy="fp32", **FEATURES)).manifest
    for component in manifest.components:
        assert component.bounds.get("rank", (0, 16)) == (0, 16)
    assert manifest.requires == ("adapters", "inpainting", "skip-layer-guidance")


@pytest.mark.parametrize(
    ("policy", "limit"), [("fp32", 1e-4), pytest.param("half", 1e-2, marks=pytest.mark.nightly)]
)
def test_it_draws_what_onnx_draws(
    policy: str,
    limit: float,
    programs: Callable[..., Path],
    make_bundle: Callable[..., Path],
    adapter: Path,
) -> None:
    mask = np.zeros((64, 64), bool)
    mask[:, 24:] = True
    picture = np.arange(64 * 64 * 3, dtype=np.uint32).reshape(64, 64, 3) % 251
    painted = {"image": picture.astype(np.uint8), "mask": mask, "strength": 0.8, "adapters": MIX}
    with (
        load(make_bundle(policy=policy, **FEATURES), adapter) as peer,
        load(programs(policy=policy, **FEATURES), adapter) as pipe,
    ):
        drawn = []
        for kind in (*KINDS, painted):
            options = {k: v for k, v in QUICK.items() if k != "size" or "image" not in kind}
            wanted = peer.generate(PROMPT, seed=5, **options, **kind).latents
            drawn.append(pipe.generate(PROMPT, seed=5, **options, **kind).latents)
            assert relative_error(drawn[-1], wanted) <= limit, kind
        again = pipe.generate(PROMPT, seed=5, **QUICK).latents
        assert np.array_equal(again, drawn[0]), "nothing stays of an adapter"
        jobs = [Job(pipe.request(PROMPT, seed=5, **QUICK, **KINDS[i])) for i in (3, 0, 1)]
        pipe.draw(jobs)
        for i, job in zip((3, 0, 1), jobs, strict=True):
            assert isinstance(job.outcome, Result), job.outcome
            assert relative_error(job.outcome.latents, drawn[i]) <= limit, (
                "each is what it is alone"
            )


@pytest.mark.nightly
@pytest.mark.parametrize("joint", [True, False])
def test_nets_steer_as_in_onnx(
    joint: bool,
    programs: Callable[..., Path],
    make_bundle: Callable[..., Path],
    tmp_path: Path,
) -> None:
    nets = {
        name: write_net(tmp_path / name, checkpoint_path(), joint, seed)
        for seed, name in enumerate(("canny", "depth"))
    }
    given = net_options(nets)
    picture = (np.indices((64, 64)).sum(0) // 8 % 2 * 255).astype(np.uint8)
    hint = np.stack([picture] * 3, axis=-1)
    halfway = {"canny": Control(hint, scale=0.8, end=0.5)}
    used = [{}, {"controls": halfway}, {"controls": {"canny": hint, "depth": hint}}]
    with (
        Pipeline.load(make_bundle(**given)) as peer,
        Pipeline.load(programs(policy="fp32", **given), device="cpu") as pipe,
    ):
        for kind in used:
            wanted, actual = (p.generate(PROMPT, seed=2, **QUICK, **kind) for p in (peer, pipe))
            assert relative_error(actual.latents, wanted.latents) <= 1e-4
