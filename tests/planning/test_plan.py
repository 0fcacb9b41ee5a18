"""Plans: their byte counts against what builds write, and their verdicts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import one_error_line

from sd35_trt.backends import BACKENDS
from sd35_trt.checkpoints.diffusers import Checkpoint
from sd35_trt.checkpoints.structure import Structure
from sd35_trt.cli.tables.plan import print_plan
from sd35_trt.components import BRANCH_DENOISER, COMBINE
from sd35_trt.dimensions import dimension_bounds
from sd35_trt.errors import UsageError
from sd35_trt.export import weightless
from sd35_trt.export.component import ExportOptions
from sd35_trt.export.sizes import Sizes, component_sizes
from sd35_trt.formats.bundle import Bundle
from sd35_trt.mini import checkpoint_path
from sd35_trt.planning import run as module
from sd35_trt.planning.options import PlanOptions
from sd35_trt.planning.plan import Plan
from sd35_trt.planning.record import plan_record
from sd35_trt.planning.run import plan, replan
from sd35_trt.planning.working_memory import compiled_activations
from sd35_trt.policies import builtin_policies, load_policy
from sd35_trt.residency import LOADED, PHASES, RESIDENT, STREAMED
from sd35_trt.store.cache import StageCache
from sd35_trt.targets import find_target


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(name, marks=pytest.mark.nightly if name == "int4-weight" else ())
        for name in builtin_policies()
    ],
)
def test_weights_are_those_of_the_bundle(policy: str, make_bundle: Callable[..., Path]) -> None:
    manifest = Bundle.open(make_bundle(policy=policy)).manifest
    components = plan(PlanOptions("mini", "cpu", policy)).components
    assert set(components) == {c.name for c in manifest.components}
    in_order = [n for names in PHASES.values() for n in names]
    assert list(components) == [n for n in in_order if n in components]
    for component in manifest.components:
        predicted = components[component.name].weights
        assert predicted == pytest.approx(component.weight_bytes, rel=0.01), component.name


def test_activations_are_those_that_tensorrt_reports(make_bundle: Callable[..., Path]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    manifest = Bundle.open(make_bundle(target="ada")).manifest
    mini = Checkpoint(checkpoint_path())
    for component in manifest.components:
        # At the largest shapes that the engine accepts.
        dims = {name: bounds[1] for name, bounds in component.bounds.items()}
        if component.name == "denoiser":
            dims["samples"] = 2 * dims["batch"]
        sizes = component_sizes(
            component.name, mini, load_policy("fp8"), ExportOptions(clip_tokens=32), dims
        )
        assert component.activation_bytes is not None
        ratio = (
            sizes.activations + BACKENDS["tensorrt-rtx"].workspace_bytes
        ) / component.activation_bytes
        # T5's attention is spelled out in the graph; the compiler fuses it.
        low, high = (1.0, 2.5) if component.name == "t5" else (0.8, 1.15)
        assert low <= ratio <= high, component.name


# Ampere's plans are for two capabilities.
@pytest.mark.parametrize(
    ("target", "policy", "names"),
    [
        ("ada", "fp8", ("clip_l",)),
        pytest.param("ada", "fp8", None, marks=pytest.mark.nightly),
        pytest.param("ampere", "int8-weight", ("clip_l", "conditioner"), marks=pytest.mark.nightly),
    ],
)
def test_the_compiler_tells_what_the_manifest_holds(
    make_bundle: Callable[..., Path],
    stage_cache: Path,
    target: str,
    policy: str,
    names: tuple[str, ...] | None,
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    manifest = Bundle.open(make_bundle(target=target)).manifest
    assert manifest.policy.name == policy
    mini = Checkpoint(checkpoint_path())
    assert len(manifest.components) == 7
    for component in manifest.components:
        if names and component.name not in names:
            continue
        bounds = dimension_bounds(
            component.name, manifest.ranges, manifest.defaults, 32, manifest.guided
        )
        actual = compiled_activations(
            component.name,
            mini,
            load_policy(policy),
            ExportOptions(clip_tokens=32),
            bounds,
            find_target(target),
            StageCache(stage_cache),
        )
        assert actual == pytest.approx(component.activation_bytes, rel=0.05), component.name


@pytest.mark.nightly
def test_what_left_out_blocks_would_add(stage_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    mini, ada = Checkpoint(checkpoint_path()), find_target("ada")
    bounds = {
        "batch": (1, 1, 4), "samples": (2, 2, 8), "steps": (1, 28, 28), "tokens": (32, 64, 64),
        "height": (8, 16, 16), "width": (8, 16, 16),
    }  # fmt: skip

    def found(name: str, guided: bool) -> int:
        options, cache = ExportOptions(32, guided), StageCache(stage_cache / f"{blocks}-blocks")
        return compiled_activations(name, mini, load_policy("half"), options, bounds, ada, cache)

    # With guidance, the manifest's figure is the test.
    cases = [("conditioner", True), ("denoiser", False)]
    results = []
    for blocks in (6, 4):  # of mini's six
        monkeypatch.setitem(weightless._BLOCKS, "transformer", ("transformer_blocks", blocks))
        results.append([found(name, guided) for name, guided in cases])
    assert results[0] == pytest.approx(results[1], rel=0.01)


@pytest.mark.nightly
def test_exact_plans(run, stage_cache: Path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    exact = plan(PlanOptions("mini", "rtx4090", size=(64, 64), exact=True, cache_dir=stage_cache))
    for component in plan_record(exact)["components"]:
        sizes = exact.components[component["name"]]
        assert component["activation_bytes"] == sizes.compiled
        assert (
            component["peak_bytes"] >= sizes.compiled + sizes.ports + exact.residency.resident_bytes
        )
    assert exact.exact
    assert plan_record(exact)["exact"] is True
    # A GPU of the same family has the same engines, others have not.
    assert replan(exact, find_target("rtx4060")).components == exact.components
    other = replan(exact, find_target("rtx3090"))
    assert not other.exact
    assert other.components["t5"] == replace(exact.components["t5"], compiled=None)
    for gpu in ("cpu", "h100"):
        status, out, err = run("plan", "--gpu", gpu, "--exact")
        assert (status, out) == (2, "")
        assert "leave out --exact" in one_error_line(err)


def test_exact_needs_the_compiler(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    status, out, err = run("plan", "--gpu", "ada", "--exact")
    assert (status, out) == (1, "")
    assert "pip install 'sd35-trt[rtx]'" in one_error_line(err)


def test_a_checkpoint_without_t5(large_checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for entry in large_checkpoint.iterdir():
        if entry.name not in ("text_encoder_3", "model_index.json"):
            (copy / entry.name).symlink_to(entry)
    index = json.loads((large_checkpoint / "model_index.json").read_text())
    index["text_encoder_3"] = [None, None]
    (copy / "model_index.json").write_text(json.dumps(index))
    whole = plan(PlanOptions(str(large_checkpoint), "ada", size=(128, 128)))
    without = plan(PlanOptions(str(copy), "ada", size=(128, 128)))
    assert set(whole.components) - set(without.components) == {"t5"}
    assert without.components["denoiser"] == whole.components["denoiser"]


@pytest.fixture(scope="module")
def large() -> Plan:
    return plan(PlanOptions("large", "rtx4060"))


def on(large: Plan, target: str, budget: int | None = None) -> Plan:
    return replan(large, find_target(target), budget)


def measured(
    source: Checkpoint | Structure,
    policy: str,
    component: str,
    size: tuple[int, int],
    batch: int = 1,
    guided: bool = True,
) -> Sizes:
    width, height = size
    dims = {"batch": batch, "samples": 2 * batch, "steps": 28, "tokens": 333,
            "height": height // 8, "width": width // 8,
            "image_height": height, "image_width": width}  # fmt: skip
    options = ExportOptions(clip_tokens=77, guided=guided)
    return component_sizes(component, source, load_policy(policy), options, dims)


def test_large_has_the_published_number_of_parameters(large: Plan) -> None:
    # 8.1 billion in the transformer, of which 2.7 are step-invariant.
    half = {
        name: measured(Structure("large"), "half", name, (1024, 1024))
        for name in ("conditioner", "denoiser")
    }
    billions = {name: sizes.weights / 2e9 for name, sizes in half.items()}
    assert billions["conditioner"] == pytest.approx(2.7, abs=0.05)
    assert sum(billions.values()) == pytest.approx(8.06, abs=0.05)
    # FP8 halves the loop, but for the output projections; its operands are fused away.
    assert large.components["denoiser"].weights < 6.0e9
    assert large.components["denoiser"].activations == pytest.approx(
        half["denoiser"].activations, rel=0.25
    )


def test_large_on_an_8_gb_card(large: Plan) -> None:
    assert large.budget == 8 * 2**30
    assert large.residency.fits
    assert large.residency.placements["t5"].kind == STREAMED
    assert large.residency.placements["denoiser"].kind == RESIDENT
    assert large.verdict.startswith("fits in 8 GiB: yes, with")
    assert large.verdict.endswith("streamed (build with --weight-streaming)")
    tight = on(large, "rtx4060", 7_500_000_000)
    assert tight.residency.fits
    assert tight.residency.placements["denoiser"].kind in (RESIDENT, LOADED)
    assert tight.residency.peak_bytes <= 7.5e9


def test_budgets_from_none_to_plenty(large: Plan) -> None:
    plenty = on(large, "l40s")
    assert plenty.verdict == "fits in 48 GiB: yes, with everything resident"
    assert plan_record(plenty)["load_seconds_per_image"] == 0
    assert on(large, "rtx4060", large.least_bytes).residency.fits
    short = on(large, "rtx4060", large.least_bytes - 1)
    assert not short.residency.fits
    assert f"no, it takes at least {large.least_bytes / 1e9:.1f} GB" in short.verdict
    family = on(large, "ada")
    assert "everything resident takes" in family.verdict
    assert plan_record(family)["fits"] is None
    assert plan_record(family)["load_seconds_per_image"] is None


def test_only_some_builders_stream(large: Plan) -> None:
    assert find_target("h100").builder == "tensorrt"
    assert on(large, "h100", 8 * 2**30).residency.fits
    without = on(large, "cpu", 8 * 2**30)
    assert not without.residency.fits
    assert "onnxruntime cannot stream weights" in without.verdict


def test_loading_follows_bus_and_disk(large: Plan) -> None:
    narrow = plan_record(large)
    wide = plan_record(on(large, "rtx4090", 8 * 2**30))
    assert wide["bus_bytes_per_image"] == narrow["bus_bytes_per_image"]
    # Sixteen lanes for eight; the disk is slower than either.
    assert wide["load_seconds_per_image"] == pytest.approx(narrow["load_seconds_per_image"] / 2)
    assert wide["first_load_seconds"] == narrow["first_load_seconds"]
    slow = replace(large, target=replace(large.target, bus="PCIe 1.0 x1"))
    assert slow.seconds_from_disk(10**9) == slow.seconds_from_host(10**9)


def test_activations_grow_with_size_batch_and_guidance() -> None:
    mini = Checkpoint(checkpoint_path())

    def denoiser(width: int, height: int, batch: int = 1, guided: bool = True) -> int:
        return measured(mini, "fp8", "denoiser", (width, height), batch, guided).activations

    base = denoiser(256, 256)
    # Nine times the pixels, beside 333 tokens of text.
    assert denoiser(384, 384) > 1.5 * denoiser(128, 128)
    # Twice the pictures take twice the memory.
    assert denoiser(256, 256, batch=2) == pytest.approx(2 * base, rel=0.02)
    assert denoiser(256, 256, guided=False) == pytest.approx(base / 2, rel=0.1)
    assert denoiser(256, 128) == denoiser(128, 256)


def test_the_largest_activation_of_the_decoder_is_accounted_for() -> None:
    sizes = measured(Structure("medium"), "half", "vae_decoder", (512, 512))
    # Its last up-block has 256 channels at full size in FP16: input, norm and activation.
    assert sizes.activations >= 3 * 256 * 512 * 512 * 2
    # Besides, what cuDNN copies of its widest convolution: input and output.
    assert 4 * 256 * 512 * 512 * 2 < sizes.with_cudnn < 5 * 256 * 512 * 512 * 2


# Of SD3.5 Medium in half at 1024×1024, read off an H200 with ONNX Runtime 1.31: when a session was
# opened, and by how much its first run enlarged the arena; GB.
ON_A_GPU = {
    "clip_g": (1.68, 0.00),
    "t5": (9.59, 0.14),
    "conditioner": (1.69, 0.10),
    "denoiser": (3.37, 0.54),
    "vae_encoder": (0.16, 2.73),
    "vae_decoder": (0.20, 6.24),
}


@pytest.mark.parametrize("name", ON_A_GPU)
def test_onnxruntime_takes_on_a_gpu_what_is_estimated(name: str) -> None:
    opened, grown = ON_A_GPU[name]
    sizes = measured(Structure("medium"), "half", name, (1024, 1024))
    assert sizes.allocated / 1e9 == pytest.approx(opened, abs=0.01)
    assert sizes.in_arena / 1e9 == pytest.approx(grown, rel=0.02, abs=0.15)


def test_turbo_needs_no_guidance(monkeypatch: pytest.MonkeyPatch, large: Plan) -> None:
    requests = []
    monkeypatch.setattr(module, "measure", lambda *a: requests.append(a) or large.components)
    turbo = plan(PlanOptions("large-turbo", "rtx4090", size=(512, 512)))
    assert (turbo.variant, turbo.steps, turbo.guided) == ("large-turbo", 4, False)
    assert requests[0][2:5] == ((512, 512), 1, False)


def test_plan_prints_a_table(run, large: Plan, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    print_plan(large)
    out = capsys.readouterr().out
    for word in ("large for rtx4060", "streamed", "resident", "5.8 GB", "conditioning", "verdict"):
        assert word in out
    status, out, _ = run("plan", "--model", "mini", "--gpu", "rtx4090", "--json")
    data = json.loads(out)
    assert (status, data["fits"], data["policy"]) == (0, True, "fp8")
    assert 0 < data["peak_bytes"] <= data["budget_bytes"] == 24 * 2**30
    assert {c["kind"] for c in data["components"]} == {RESIDENT}
    assert [s["name"] for s in data["stages"]][-1] == "decoding"
    status, out, _ = run("plan", "--gpu", "cpu", "--vram", "1GiB")
    assert status == 0
    assert "fits in 1 GiB: yes" in out


def test_wrong_use_of_plan(run) -> None:  # type: ignore[no-untyped-def]
    for arguments, words in (
        (["--gpu", "voodoo"], "unknown GPU"),
        (["--gpu", "t4", "--policy", "fp8"], "which t4 cannot run"),
        (["--gpu", "ada", "--size", "100x128"], "in steps of 16"),
        (["--gpu", "ada", "--size", "100000"], "is not within 16:384"),
        (["--gpu", "ada", "--batch", "0"], "use 1 or more"),
        (["--gpu", "ada", "--vram", "much"], "is not a number of bytes"),
        (
            ["--gpu", "ada", "--vram", "8"],
            "8 is less than 1 MiB — say it with a unit, such as 8GiB",
        ),
        (["--gpu", "ada", "--vram", "9" * 400 + "GB"], "more than any memory"),
        ([], "Missing option '--gpu'"),
    ):
        status, out, err = run("plan", *arguments)
        assert (status, out) == (2, ""), arguments
        assert words in one_error_line(err)
    status, _, err = run("plan", "--gpu", "ada", "--model", "./none")
    assert status == 1
    assert "is missing" in one_error_line(err)


def test_two_gpus_hold_a_branch_each() -> None:
    both = plan(PlanOptions(model="mini", split_guidance=True))
    assert both.second is not None
    assert {BRANCH_DENOISER, COMBINE} == set(both.second.components)
    assert {BRANCH_DENOISER, COMBINE, "t5"} <= set(both.components)
    assert "denoiser" not in both.components
    assert both.second.residency.peak_bytes < both.residency.peak_bytes
    alone = plan(PlanOptions(model="mini"))
    mine, whole = both.components[BRANCH_DENOISER], alone.components["denoiser"]
    assert mine.weights == whole.weights
    assert mine.activations < whole.activations, "one branch is computed, not two"
    record = plan_record(both)
    assert record["second"]["peak_bytes"] == both.second.residency.peak_bytes
    assert replan(both, find_target("h100")).second.target.name == "h100"  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="this bundle has none"):
        plan(PlanOptions(model="mini", split_guidance=True, guidance=False))
