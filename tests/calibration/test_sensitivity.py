"""Groups of linears, their errors, and the policy that a byte budget gives."""

from __future__ import annotations

import fnmatch
import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from random_checkpoints import damaged

from sd35_trt.build import BuildOptions, build
from sd35_trt.calibration.calibrate import CalibrateOptions, analyse_sensitivity, calibrate
from sd35_trt.calibration.groups import (
    Group,
    LinearSize,
    choose_half,
    group_linears,
    make_policy,
    number_globs,
    policy_toml,
)
from sd35_trt.calibration.sensitivity import PLOT, POLICY, RESULT, Sensitivity, SensitivityRecord
from sd35_trt.checkpoints.diffusers import Checkpoint
from sd35_trt.errors import Sd35Error, UsageError
from sd35_trt.export.inventory import inventory
from sd35_trt.policies import Policy, load_policy
from sd35_trt.runtime import Pipeline

#: Between the 3.8 MB of the random model's linears in FP8 and the 7.6 MB in half precision.
BUDGET = 5_500_000


@pytest.mark.parametrize("numbers", [range(13), range(8, 12), range(12, 25), range(25, 38), [7]])
def test_number_globs(numbers: range) -> None:
    globs = number_globs(numbers)
    matched = [n for n in range(120) if any(fnmatch.fnmatchcase(str(n), g) for g in globs)]
    assert matched == list(numbers)
    assert len(globs) <= 3


def groups_of(root: Path) -> list[Group]:
    checkpoint = Checkpoint(root)
    linears = [
        LinearSize(f"{e.component}/{e.layer}", e.shape[0] * e.shape[1], e.shape[1])
        for e in inventory(checkpoint, load_policy("half"))
        if e.linear and e.component in ("conditioner", "denoiser")
    ]
    groups = group_linears(linears, int(checkpoint.config("transformer")["num_layers"]))
    assert sum(len(group.layers) for group in groups) == len(linears), "each in one group"
    assert {layer for group in groups for layer in group.layers} == set(linears)
    return groups


@pytest.mark.parametrize("structure", ["large", "medium"])
def test_groups_and_their_bytes(structure: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(f"{structure}_checkpoint")
    groups = groups_of(root)
    assert len(groups) == 5 * 3 + 2
    half = inventory(Checkpoint(root), load_policy("half"))
    sizes = {f"{e.component}/{e.layer}": e.bytes for e in half}
    for group in groups:
        assert group.half_bytes == sum(sizes[layer.name] for layer in group.layers)


def test_policies_of_groups(medium_checkpoint: Path, tmp_path: Path) -> None:
    groups = groups_of(medium_checkpoint)
    errors = [0.01 * (k + 1) for k in range(len(groups))]
    half_groups = groups[3:5]
    policy = make_policy("mine", load_policy("fp8"), groups, errors, half_groups)
    path = tmp_path / "policy.toml"
    path.write_text(policy_toml(policy), "utf-8")
    chosen_policy = load_policy(str(path))
    assert chosen_policy == policy
    quantized = {
        layer.name for group in groups if group not in half_groups for layer in group.layers
    }
    for e in inventory(Checkpoint(medium_checkpoint), chosen_policy):
        if e.component in ("conditioner", "denoiser"):
            expected = "fp8" if f"{e.component}/{e.layer}" in quantized else "half"
        else:
            expected = "half"
        assert e.precision == expected, e.layer
        if expected == "fp8":
            fp8 = next(x for g in groups for x in g.layers if x.name == f"{e.component}/{e.layer}")
            assert e.bytes == pytest.approx(fp8.fp8_bytes, abs=8), "scales may be stored smaller"


def test_a_policy_file_keeps_odd_characters(tmp_path: Path) -> None:
    base = load_policy("half")
    odd = Policy('a "b" \\ c', "Größe\n2", base.rules)
    (tmp_path / "p.toml").write_text(policy_toml(odd), "utf-8")
    assert load_policy(str(tmp_path / "p.toml")) == odd


def test_the_worst_for_their_bytes_are_kept_half() -> None:
    def group(kind: str, size: int) -> Group:
        return Group(kind, "", (LinearSize(f"denoiser/{kind}", size, 0),), (kind,))

    small, large, mild = group("small", 1000), group("large", 100_000), group("mild", 1000)
    groups, errors = [small, large, mild], [0.02, 0.03, 0.001]
    fp8 = sum(g.fp8_bytes for g in groups)
    assert choose_half(groups, errors, fp8) == []
    assert choose_half(groups, errors, fp8 + 1000) == [small]
    assert choose_half(groups, errors, fp8 + 2500) == [small, mild], "what fits, in order"
    assert choose_half(groups, errors, fp8 + 101_500) == [small, large]
    assert choose_half(groups, errors, 10**9) == groups


@pytest.fixture(scope="module")
def analysis(
    large_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CalibrateOptions, Sensitivity]:
    options = CalibrateOptions(
        model=str(large_checkpoint), steps=2, limit=1, sizes=((64, 64),), guidance=3.0,
        out=tmp_path_factory.mktemp("sensitivity") / "out", command="sd35-trt calibrate …",
    )  # fmt: skip
    return options, analyse_sensitivity(options, BUDGET)[0]


def test_errors(analysis: tuple[CalibrateOptions, Sensitivity]) -> None:
    _, result = analysis
    assert all(0 < error < result.everything < 1 for error in result.errors)
    # Independent errors add in squares, about.
    squares = sum(error**2 for error in result.errors) ** 0.5
    assert result.everything == pytest.approx(squares, rel=0.5)
    assert 0 < result.base < result.everything
    assert result.chosen is not None
    assert result.chosen < result.everything
    smallest, largest = (
        sum(getattr(g, k) for g in result.groups) for k in ("fp8_bytes", "half_bytes")
    )
    assert smallest < result.base_bytes < largest


def test_budget(analysis: tuple[CalibrateOptions, Sensitivity]) -> None:
    options, result = analysis
    assert result.half
    assert result.chosen_bytes is not None
    rest = [g for g in result.groups if g not in result.half]
    smallest_left = min(g.saved_bytes for g in rest)
    assert result.chosen_bytes <= BUDGET < result.chosen_bytes + smallest_left
    policy = load_policy(str(options.out / POLICY))
    entries = inventory(Checkpoint(Path(options.model)), policy)
    quantized = {f"{e.component}/{e.layer}" for e in entries if e.precision == "fp8"}
    assert quantized == {layer.name for group in rest for layer in group.layers}


def test_files(analysis: tuple[CalibrateOptions, Sensitivity]) -> None:
    options, result = analysis
    assert {p.name for p in options.out.iterdir()} == {RESULT, PLOT, POLICY}
    text = (options.out / RESULT).read_text("utf-8")
    assert msgspec.json.decode(text, type=SensitivityRecord) == result.record()
    data = json.loads(text)
    assert list(data) == [
        "provenance", "everything", "nothing", "base_policy", "groups", "chosen"
    ]  # fmt: skip
    assert list(data["chosen"]) == ["half", "error", "bytes"]
    for fields in data["groups"]:
        assert list(fields) == ["name", "kind", "depth", "error", "saved_bytes", "layers"]
    assert "chosen" not in msgspec.to_builtins(replace(result, half=None).record())
    assert data["everything"]["error"] == result.everything
    assert [g["error"] for g in data["groups"]] == list(result.errors)
    assert data["chosen"]["half"] == [g.name for g in result.half or ()]
    assert data["provenance"]["command"] == "sd35-trt calibrate …"
    assert data["nothing"]["bytes"] - data["everything"]["bytes"] == sum(
        g["saved_bytes"] for g in data["groups"]
    )
    assert (options.out / PLOT).read_bytes().startswith(b"\x89PNG")


@pytest.mark.nightly
def test_the_policy_builds_and_draws(
    analysis: tuple[CalibrateOptions, Sensitivity], stage_cache: Path, tmp_path: Path
) -> None:
    options, result = analysis
    options = replace(options, policy=str(options.out / POLICY), out=tmp_path / "calibration")
    calibrate(options)
    bundle = build(
        BuildOptions(
            model=options.model, policy=options.policy, calibration=options.out,
            out=tmp_path / "bundle", size=(64, 64), cache_dir=stage_cache,
        )
    )  # fmt: skip
    with Pipeline.load(bundle) as pipe:
        images = pipe.generate("a red kite", steps=2).images
        fp8 = sum(c.precisions.get("fp8", 0) for c in pipe.manifest.components)
    assert fp8 == sum(len(g.layers) for g in result.groups if g not in (result.half or ()))
    assert images.shape == (1, 64, 64, 3)
    assert images.std() > 1


def test_a_budget_below_everything_in_fp8(
    analysis: tuple[CalibrateOptions, Sensitivity], tmp_path: Path
) -> None:
    options = replace(analysis[0], out=tmp_path / "out", steps=1, limit=1)
    with pytest.raises(UsageError, match=r"--budget 1,000 is less than the [\d,]+ bytes"):
        analyse_sensitivity(options, 1000)
    assert not options.out.exists()


def test_nan_names_the_module(large_checkpoint: Path, tmp_path: Path) -> None:
    tensor = "transformer_blocks.2.attn.add_v_proj.bias"
    root = damaged(large_checkpoint, tmp_path / "nan", "transformer", tensor, float("nan"))
    options = CalibrateOptions(
        model=str(root), steps=1, limit=1, sizes=((64, 64),), out=tmp_path / "out"
    )
    with pytest.raises(Sd35Error, match=r"transformer_blocks\.2\.attn\.add_v_proj has nan"):
        analyse_sensitivity(options)
    assert not options.out.exists()
