"""``sd35-trt verify --against`` as a user sees it: figures, page, gate and errors."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from conftest import one_error_line

from sd35_trt.formats.bundle import Bundle
from sd35_trt.formats.report import Report
from sd35_trt.quality.compare import verify
from sd35_trt.quality.draw import PictureSet
from sd35_trt.quality.options import VerifyOptions

QUICK = ["--captions", 2, "--steps", 2, "--json"]


@pytest.fixture(scope="module")
def bundles(make_bundle: Callable[..., Path]) -> dict[str, Path]:
    return {name: make_bundle(policy=name) for name in ("half", "int8-weight")}


@pytest.fixture(scope="module")
def options(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> VerifyOptions:
    """int8-weight against half; the report is written into a copy."""
    copy = shutil.copytree(bundles["int8-weight"], tmp_path_factory.mktemp("report") / "int8")
    return VerifyOptions(
        Path(copy), str(bundles["half"]), captions=5, seed=3, steps=3, command="a <command>"
    )


@pytest.fixture(scope="module")
def report(options: VerifyOptions) -> Report:
    return verify(options)


@pytest.fixture
def half(bundles: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to write a report in."""
    return Path(shutil.copytree(bundles["half"], tmp_path / "half"))


def page(bundle: Path) -> str:
    return (bundle / "report" / "index.html").read_text("utf-8")


def test_equal_bundles_draw_equal_pictures(run, half: Path, bundles: dict[str, Path]) -> None:  # type: ignore[no-untyped-def]
    status, out, err = run(
        "verify", half, "--against", bundles["half"], *QUICK,
        "--min-psnr", 99, "--max-latent-error", 0, "--max-accuracy-drop", 0,
    )  # fmt: skip
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report == json.loads((half / "report" / "report.json").read_text("utf-8"))
    assert report["images"]["identical"] == report["run"]["images"] == 2
    assert report["images"]["psnr"] == {"all": None, "median": None, "worst": None}
    assert report["images"]["ssim"]["mean"] == 1.0
    assert set(report["latents"]["free_running"]["mean"]) == {0.0}
    assert set(report["latents"]["teacher_forced"]["mean"]) == {0.0}
    assert report["linears"]
    assert {row["own_error"] for row in report["linears"]} == {0.0}
    assert {row["in_place_error"] for row in report["linears"]} == {0.0}
    assert report["scenes"]["whole"]["paired"]["difference"] == 0.0
    assert report["passed"]
    assert len(report["gate"]) == 3
    assert "All pairs are identical" in page(half)
    # The report is not part of what the manifest vouches for.
    status, out, _ = run("verify", half)
    assert status == 0
    assert "all as the manifest says" in out


@pytest.mark.nightly
def test_fewer_bits_are_worse(
    report: Report,
    options: VerifyOptions,
    make_bundle: Callable[..., Path],
    tmp_path: Path,
) -> None:
    copy = shutil.copytree(make_bundle(policy="int4-weight"), tmp_path / "int4")
    eight, four = report, verify(replace(options, bundle=Path(copy)))
    assert 0 < eight.latents.final.mean < four.latents.final.mean
    forced = [np.array(r.latents.teacher_forced.mean) for r in (eight, four)]
    assert (forced[0] > 0).all()
    assert (forced[0] < forced[1]).all()
    assert eight.images.psnr.all is not None
    assert four.images.psnr.all is not None
    assert eight.images.psnr.all > four.images.psnr.all
    assert eight.images.ssim.mean > four.images.ssim.mean
    worse = 0
    for one, other in zip(eight.linears, four.linears, strict=True):
        assert (one.component, one.layer) == (other.component, other.layer)
        assert one.own_error is not None
        assert other.own_error is not None
        if other.precision == "int4-weight":
            assert one.precision == "int8-weight"
            assert 4 * one.own_error < other.own_error < 0.5
            worse += 1
        elif other.precision == "int8-weight":
            assert 1e-4 < other.own_error < 0.02
        else:
            assert other.own_error == 0.0
    assert worse > 50


def test_fp8_layers(make_bundle: Callable[..., Path], half: Path) -> None:
    """W8A8: three bits of mantissa on both sides of every product."""
    bundle = make_bundle(policy="fp8")
    report = verify(VerifyOptions(half, str(bundle), captions=1, steps=1))
    precisions = {row.reference_precision for row in report.linears}
    assert "fp8" in precisions
    for row in report.linears:
        assert row.own_error is not None
        if row.reference_precision == "fp8":
            assert 0.005 < row.own_error < 0.1
        else:
            assert row.own_error == 0.0


def test_the_report_is_complete(
    report: Report, options: VerifyOptions, bundles: dict[str, Path]
) -> None:
    text = (options.bundle / "report" / "report.json").read_text("utf-8")
    assert text == report.to_json()
    assert msgspec.json.decode(text, type=Report) == report
    assert report.run.steps == len(report.latents.sigma) == 3
    assert report.latents.sigma[-1] == 0.0
    assert [row.seed for row in report.each] == [3, 4, 5, 6, 7]
    assert all(row.candidate_right is not None for row in report.each)
    manifest = Bundle.open(bundles["int8-weight"]).manifest
    linears = {(row.component, row.layer) for row in report.linears}
    assert len(linears) == len(report.linears)
    assert ("denoiser", "transformer_blocks.0.attn.to_q") in linears
    assert {component for component, _ in linears} == {c.name for c in manifest.components} - {
        "vae_encoder"
    }
    assert report.candidate.policy == "int8-weight"
    assert report.candidate.weight_bytes["denoiser"] < report.reference.weight_bytes["denoiser"]
    mean = np.mean([row.latent_error for row in report.each])
    assert report.latents.final.mean == pytest.approx(mean)


class _Links(HTMLParser):
    """Everything a page would fetch, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.names: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.names += [v or "" for k, v in attrs if k == "id"]
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "action")]


def test_the_page_stands_alone(report: Report, options: VerifyOptions) -> None:
    text = page(options.bundle)
    parser = _Links()
    parser.feed(text)
    assert parser.links
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in parser.links)
    inside = [link[1:] for link in parser.links if link.startswith("#")]
    inside += re.findall(r"url\(#([^)]*)\)", text)
    assert inside
    assert set(inside) <= set(parser.names)
    assert len(set(parser.names)) == len(parser.names)
    assert not {"script", "link", "iframe", "object"} & set(parser.tags)
    assert "http" not in text
    assert "@import" not in text
    assert text.count("url(") == text.count("url(#")
    assert parser.tags.count("svg") == 4
    assert parser.tags.count("img") >= 3 * 5
    assert "prefers-color-scheme: dark" in text
    assert "a &lt;command&gt;" in text
    for row in report.each:
        assert row.prompt.split()[0] in text


def test_a_missed_threshold_fails_and_the_report_is_written(
    run, half: Path, bundles: dict[str, Path]
) -> None:  # type: ignore[no-untyped-def]
    status, out, err = run(
        "verify", half, "--against", bundles["int8-weight"], *QUICK, "--min-psnr", 90
    )
    assert status == 1
    line = one_error_line(err)
    assert "misses --min-psnr 90" in line
    assert f"see {half}/report/index.html" in line
    report = json.loads((half / "report" / "report.json").read_text("utf-8"))
    assert report == json.loads(out)
    assert not report["passed"]
    assert "missed" in page(half)


def test_half_is_built_where_none_is_given(
    run, bundles: dict[str, Path], stage_cache: Path, report: Report, tmp_path
) -> None:  # type: ignore[no-untyped-def]
    bundle = shutil.copytree(bundles["int8-weight"], tmp_path / "int8")
    status, out, _ = run(
        "verify", bundle, "--against", "half", "--cache-dir", stage_cache,
        "--captions", 5, "--seed", 3, "--steps", 3,
    )  # fmt: skip
    assert status == 0
    for word in ("latent error", "PSNR", "SSIM", "LPIPS", "scenes right", "quantized linears"):
        assert word in out
    embedded = msgspec.json.decode((bundle / "report" / "report.json").read_bytes(), type=Report)
    assert embedded.linears == report.linears
    assert embedded.latents == report.latents
    assert embedded.reference.policy == "half"
    assert not list((stage_cache / "references").iterdir())


def test_prompts_of_ones_own(run, medium_bundle: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Another model than mini: no scenes to count."""
    bundle = shutil.copytree(medium_bundle, tmp_path / "medium")
    Path("prompts.txt").write_text('a <b>fox</b> & "hound"\n\nzwei Füchse\n', "utf-8")
    arguments = ["verify", bundle, "--against", medium_bundle, "--steps", 1, "--json"]
    status, out, _ = run(*arguments, "--prompts", "prompts.txt")
    assert status == 0
    report = json.loads(out)
    assert [row["prompt"] for row in report["each"]] == ['a <b>fox</b> & "hound"', "zwei Füchse"]
    assert report["scenes"] is None
    assert report["run"]["prompts"] == "prompts.txt"
    status, out, _ = run(*arguments, "--captions", 1)
    assert status == 0
    assert json.loads(out)["run"]["prompts"] == "packaged prompts"


def test_needs_no_torch(half: Path, tmp_path: Path) -> None:
    code = f"""
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

HIDDEN = ("torch", "transformers", "diffusers", "modelopt")
find_spec = importlib.util.find_spec

class Absent(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
importlib.util.find_spec = lambda name, *rest: None if name in HIDDEN else find_spec(name, *rest)
from sd35_trt.quality.compare import verify
from sd35_trt.quality.options import VerifyOptions
half = Path({str(half)!r})
report = verify(VerifyOptions(half, str(half), captions=1, steps=1))
assert report.images.identical == 1
assert report.images.lpips_note == "torch is not installed"
"""
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr


def test_wrong_use(run, half: Path, medium_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    Path("empty.txt").write_text("\n\n")
    Path("latin.txt").write_bytes("zwei Füchse".encode("latin-1"))
    Path("one.txt").write_text("a red star\n")
    before = sorted(half.iterdir())
    against = ["--against", half]
    cases: list[tuple[list[object], int, str]] = [
        (["--min-psnr", 30], 2, "--min-psnr needs --against"),
        (["--prompts", "one.txt"], 2, "--prompts needs --against"),
        (["--against", "nowhere"], 1, "nowhere is not a bundle"),
        (["--against", medium_bundle], 1, "are of different models"),
        ([*against, "--prompts", "none.txt"], 2, "none.txt"),
        ([*against, "--prompts", "empty.txt"], 2, "empty"),
        ([*against, "--prompts", "latin.txt"], 2, "not UTF-8"),
        ([*against, "--prompts", "one.txt", "--captions", 2], 2, "one.txt holds 1"),
        ([*against, "--prompts", "one.txt", "--max-accuracy-drop", 1], 2, "counts scenes"),
        ([*against, "--captions", 0], 2, "at least 1"),
        (["--against", "half", "--steps", 0], 2, "steps must be 1 to 1000"),
        (["--against", "half", "--seed", -1], 2, "seed must be 0 to"),
        ([*against, "--model", "mini"], 2, "needs no checkpoint"),
    ]
    for arguments, expected, words in cases:
        status, out, err = run("verify", half, *arguments)
        assert (status, out) == (expected, ""), arguments
        assert words in one_error_line(err)
    assert sorted(half.iterdir()) == before


def test_an_interruption_leaves_the_older_report(half: Path, bundles: dict[str, Path]) -> None:
    (half / "report").mkdir()
    (half / "report" / "report.json").write_text("the older one")
    before = {path: path.stat().st_mtime_ns for path in half.rglob("*")}
    options = VerifyOptions(half, str(bundles["int8-weight"]), captions=1, steps=1)
    for stage in ("reference", "layers"):

        def stop(what: str, process: int, total: int, stage: str = stage) -> None:
            if what == stage:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            verify(options, stop)
        assert {path: path.stat().st_mtime_ns for path in half.rglob("*")} == before


def test_an_overflowing_bundle_is_named(
    half: Path, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sd35_trt.errors import Sd35Error
    from sd35_trt.runtime.sessions.onnxruntime import OnnxRuntimeSession

    whole = OnnxRuntimeSession.run

    def broken(self: OnnxRuntimeSession, inputs: Any, outputs: Any) -> None:
        whole(self, inputs, outputs)
        if "next_latents" in outputs:
            outputs["next_latents"][:] = np.nan

    monkeypatch.setattr(OnnxRuntimeSession, "run", broken)
    with pytest.raises(Sd35Error, match="latents are not finite") as caught:
        verify(VerifyOptions(half, str(bundles["half"]), captions=1, steps=1))
    assert str(bundles["half"]) in str(caught.value)
    assert not (half / "report").exists()


@pytest.mark.parametrize(("count", "batch"), [(5, (1, 4)), (5, (4, 4)), (33, (1, 64)), (1, (3, 4))])
def test_batches_are_within_what_the_bundles_accept(count: int, batch: tuple[int, int]) -> None:
    pictures = PictureSet([str(i) for i in range(count)], 0, 1, (128, 128), batch)
    batches = list(pictures.batches())
    assert all(batch[0] <= len(indices) <= min(batch[1], 16) for indices in batches)
    drawn = [i for indices in batches for i in dict.fromkeys(indices)]
    assert drawn == list(range(count))
