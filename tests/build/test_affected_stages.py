"""Which stages a change rebuilds, and two builds that share a cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from calibrations import save
from conftest import UNFINISHED

import sd35_trt.build.concurrency
import sd35_trt.build.export
import sd35_trt.build.run
from sd35_trt.build import BuildOptions, build
from sd35_trt.engines.tensorrt import TensorRTBuilder
from sd35_trt.export.provenance import tool_versions
from sd35_trt.formats.bundle import Bundle
from sd35_trt.formats.calibration import Calibration, PromptsIdentity
from sd35_trt.mini import calibration_path
from sd35_trt.policies import load_policy
from sd35_trt.store.cache import StageCache
from sd35_trt.store.stages import Stage

COMPONENTS = {"clip_l", "clip_g", "t5", "conditioner", "denoiser", "vae_decoder", "vae_encoder"}
PLANS = {f"{name}-plan" for name in COMPONENTS}
PICTURES = {"denoiser-plan", "vae_decoder-plan", "vae_encoder-plan"}


class Dry:
    """Runs a build's stages up to the question whether they are in the cache.

    A stage that is not there is answered by its unchanged sister, with other hashes where its
    content would be another.
    """

    def __init__(self, work: Path) -> None:
        self.found: dict[str, Path] = {}
        self.missing: set[str] = set()
        self.other_content = True
        self._work = work

    def __call__(self, cache: StageCache, stage: Stage, progress: Any) -> Path:
        folder = cache.find(stage.name, stage.key)
        if folder is not None:
            self.found.setdefault(stage.name, folder)
            return folder
        self.missing.add(stage.name)
        sister = self.found[stage.name]
        if not self.other_content:
            return sister
        folder = self._work / stage.name
        shutil.copytree(sister, folder, copy_function=os.symlink)
        (folder / "stage.json").unlink()
        files = json.loads((sister / "stage.json").read_text("utf-8"))
        changed = {name: [size, "0" * 64] for name, (size, _) in files.items()}
        (folder / "stage.json").write_text(json.dumps(changed), "utf-8")
        return folder


def changed_policy(tmp_path: Path, component: str, match: str) -> str:
    text = (Path(load_policy.__code__.co_filename).parent / "fp8.toml").read_text("utf-8")
    path = tmp_path / "mine.toml"
    rule = f'component = "{component}"\nmatch = "{match}"\nprecision = "fp32"\nreason = ""\n'
    path.write_text(f"{text}\n[[rule]]\n{rule}", "utf-8")
    return str(path)


def changed_scale(tmp_path: Path) -> Path:
    calibration = Calibration.load(calibration_path())
    name = next(name for name in calibration.inputs if name.startswith("denoiser/"))
    save(
        replace(calibration, inputs={**calibration.inputs, name: 2 * calibration.inputs[name]}),
        tmp_path / "other",
    )
    return tmp_path / "other"


def changed_prompt(tmp_path: Path) -> Path:
    """Another prompt set that gives the same ranges."""
    calibration = Calibration.load(calibration_path())
    prompts = PromptsIdentity("0" * 64, 128)
    provenance = msgspec.structs.replace(calibration.provenance, prompts=prompts)
    save(replace(calibration, provenance=provenance), tmp_path / "other")
    return tmp_path / "other"


CHANGES: dict[str, tuple[Callable[[Path], dict[str, Any]], set[str]]] = {
    "nothing": (lambda tmp: {}, set()),
    "a scale": (
        lambda tmp: {"calibration": changed_scale(tmp)},
        {"denoiser", "denoiser-plan"},
    ),
    "a prompt that changes no range": (lambda tmp: {"calibration": changed_prompt(tmp)}, set()),
    "a policy line": (
        lambda tmp: {"policy": changed_policy(tmp, "clip_l", "text_projection")},
        {"clip_l", "clip_l-plan"},
    ),
    "a policy line of the transformer": (
        lambda tmp: {"policy": changed_policy(tmp, "denoiser", "proj_out")},
        {"conditioner", "denoiser", "conditioner-plan", "denoiser-plan"},
    ),
    "the size range": (lambda tmp: {"size": (128, 256)}, PICTURES),
    "the batch range": (lambda tmp: {"batch": (1, 2)}, PLANS),
    "guidance": (
        lambda tmp: {"guidance": False},
        # Without unconditional texts, every engine but the autoencoder's takes smaller batches.
        {"denoiser"} | PLANS - {"vae_decoder-plan", "vae_encoder-plan"},
    ),
    "weight streaming": (lambda tmp: {"weight_streaming": True}, PLANS),
}


@pytest.fixture
def dry(make_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dry:
    make_bundle(target="ada")
    dry = Dry(tmp_path)
    monkeypatch.setattr(sd35_trt.build.export, "run_stage", dry)
    monkeypatch.setattr(sd35_trt.build.concurrency, "run_stage", dry)
    monkeypatch.setattr(sd35_trt.build.run, "assemble", lambda *_: None)
    return dry


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_rebuilds_what_it_concerns(
    change: str, dry: Dry, stage_cache: Path, tmp_path: Path
) -> None:
    make_options, expected = CHANGES[change]
    base = BuildOptions(target="ada", out=tmp_path / "bundle", cache_dir=stage_cache)
    build(base)
    assert dry.missing == set()
    # What an earlier session of these tests built with the same change does not count.
    empty = tmp_path / "empty"
    folders = set(dry.found.values())
    for folder in folders:
        shutil.copytree(folder, empty / folder.relative_to(stage_cache), copy_function=os.symlink)
    build(replace(base, cache_dir=empty, **make_options(tmp_path)))
    assert dry.missing == expected


@pytest.mark.parametrize(
    ("library", "expected"), [("onnx", COMPONENTS | {"tokenizers"}), ("tensorrt-rtx", PLANS)]
)
def test_another_version_rebuilds_what_it_made(
    library: str, expected: set[str], dry: Dry, stage_cache: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    options = BuildOptions(target="ada", out=tmp_path / "bundle", cache_dir=stage_cache)
    build(options)
    assert dry.missing == set()
    versions = tool_versions()
    if library in versions:
        versions[library] = "0.0"
        monkeypatch.setattr(sd35_trt.build.run, "tool_versions", lambda: versions)
    else:
        monkeypatch.setattr(TensorRTBuilder, "versions", lambda self: {library: "0.0"})
    dry.other_content = False  # an equal file is not compiled again, whoever wrote it
    build(options)
    assert dry.missing == expected


@pytest.mark.nightly
def test_two_builds_at_once(mini_bundle: Path, stage_cache: Path, tmp_path: Path) -> None:
    """Into one cache that lacks some stages, killing neither and corrupting nothing."""
    cache = tmp_path / "cache"
    shutil.copytree(stage_cache, cache, copy_function=os.link, ignore=UNFINISHED)
    for name in ("tokenizers", "clip_l", "clip_l-graph"):
        shutil.rmtree(cache / name)
    script = (
        "import sys; from pathlib import Path; from sd35_trt.build import BuildOptions, build;"
        "build(BuildOptions(out=Path(sys.argv[1]), cache_dir=Path(sys.argv[2])))"
    )
    outs = [tmp_path / f"bundle{i}" for i in range(2)]
    command = [sys.executable, "-c", script]
    children = [subprocess.Popen([*command, str(out), str(cache)]) for out in outs]
    assert [child.wait() for child in children] == [0, 0]
    expected = Bundle.open(mini_bundle).manifest.components
    for out in outs:
        assert Bundle.open(out, verify=True).manifest.components == expected
    assert len(list((cache / "clip_l").iterdir())) == 1
