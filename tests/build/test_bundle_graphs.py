"""The graphs behind a bundle's engines: from the cache, by what the manifest says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from sd35_trt.build.graphs import cached_graphs, export_graphs
from sd35_trt.checkpoints.model_options import ModelOptions
from sd35_trt.errors import BundleError
from sd35_trt.formats.bundle import Bundle, PolicyRecord
from sd35_trt.progress import silent
from sd35_trt.quality.graph_source import find_graphs
from sd35_trt.store.cache import StageCache


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path]) -> Bundle:
    return Bundle.open(make_bundle(policy="fp8"))


@pytest.fixture
def cache(stage_cache: Path) -> StageCache:
    return StageCache(stage_cache)


def _own(bundle: Bundle) -> dict[str, Path]:
    return {c.name: bundle.path(c.files[0].path) for c in bundle.manifest.components}


@pytest.fixture
def own_cache(bundle: Bundle, cache: StageCache, tmp_path: Path) -> StageCache:
    """The bundle's own stages alone; those of other tests' bundles might be the ones asked for."""
    for name, path in cached_graphs(bundle, cache).items():
        (tmp_path / name).mkdir()
        (tmp_path / name / path.parent.name).symlink_to(path.parent)
    return StageCache(tmp_path)


def test_the_cache_has_the_graphs_that_were_built_from(bundle: Bundle, cache: StageCache) -> None:
    graphs, own = cached_graphs(bundle, cache), _own(bundle)
    assert graphs.keys() == own.keys()
    for name, path in graphs.items():
        assert path.is_relative_to(cache.root)
        assert path.read_bytes() == own[name].read_bytes()


def test_a_bundle_of_a_library_that_reads_another_dialect(
    bundle: Bundle, own_cache: StageCache
) -> None:
    """Its manifest tells."""
    m, graphs = bundle.manifest, cached_graphs(bundle, own_cache)
    older = replace(m, builder="tensorrt", versions={**m.versions, "tensorrt": "10.6.0"})
    assert cached_graphs(Bundle(bundle.root, older), own_cache) == {}
    newer = replace(m, builder="tensorrt", versions={**m.versions, "tensorrt": "11.2.0"})
    assert cached_graphs(Bundle(bundle.root, newer), own_cache) == graphs
    programs = replace(m, builder="inductor")
    assert cached_graphs(Bundle(bundle.root, programs), own_cache) == cached_graphs(
        bundle, own_cache
    )


def test_another_policy_checkpoint_version_or_calibration(
    bundle: Bundle, own_cache: StageCache
) -> None:
    m = bundle.manifest
    rules = tuple(r for r in m.policy.rules if r.component != "denoiser")
    files = {**m.model.files, "vae/config.json": "0" * 64}
    cases = [
        (replace(m, policy=PolicyRecord("other", "0" * 64, rules)), {"conditioner", "denoiser"}),
        (replace(m, model=replace(m.model, files=files)), {"vae_decoder", "vae_encoder"}),
        (replace(m, guided=False), {"denoiser"}),
        (replace(m, calibration=None), {"t5", "denoiser"}),
        (replace(m, versions={**m.versions, "torch": "2.0"}), {c.name for c in m.components}),
    ]
    everything = {c.name for c in m.components}
    assert cached_graphs(bundle, own_cache).keys() == everything
    for manifest, lacking in cases:
        other = cached_graphs(Bundle(bundle.root, manifest), own_cache)
        assert everything - other.keys() == lacking


def test_a_damaged_record_is_passed_over(bundle: Bundle, cache: StageCache, tmp_path: Path) -> None:
    folder = cached_graphs(bundle, cache)["clip_l"].parent
    copy = StageCache(tmp_path)
    target = Path(shutil.copytree(folder, tmp_path / "clip_l" / folder.name))
    assert list(cached_graphs(bundle, copy)) == ["clip_l"]
    inputs = json.loads((target / "inputs.json").read_text())
    assert inputs["dialect"] == "opset23"
    (target / "inputs.json").write_text("{")
    assert cached_graphs(bundle, copy) == {}
    (target / "inputs.json").write_text(json.dumps(inputs))
    (target / "model.onnx").unlink()
    assert cached_graphs(bundle, copy) == {}


def test_exporting_takes_them_from_the_cache(bundle: Bundle, cache: StageCache) -> None:
    notes: dict[str, str] = {}
    graphs = export_graphs(
        bundle, ModelOptions(), cache, lambda stage, done, total, note: notes.update({stage: note})
    )
    assert graphs == cached_graphs(bundle, cache)
    assert set(notes.values()) == {"unchanged"}
    assert not list((cache.root / "references").iterdir())


def test_a_bundle_for_several_gpus(bundle: Bundle, cache: StageCache) -> None:
    several = replace(bundle.manifest, target="ada+blackwell", builder="tensorrt-rtx")
    graphs = export_graphs(Bundle(bundle.root, several), ModelOptions(), cache, silent)
    assert graphs == cached_graphs(bundle, cache)


def test_where_graphs_are_looked_for(bundle: Bundle, cache: StageCache, tmp_path: Path) -> None:
    assert find_graphs(bundle, None, cache, silent) == _own(bundle)
    in_cache = cached_graphs(bundle, cache)
    assert find_graphs(bundle, ModelOptions(), cache, silent) == in_cache
    m = bundle.manifest
    plans = Bundle(bundle.root, replace(m, builder="tensorrt-rtx"))
    assert find_graphs(plans, None, cache, silent) == in_cache
    files = dict.fromkeys(m.model.files, "0" * 64)
    other = replace(m, builder="tensorrt-rtx", model=replace(m.model, files=files))
    with pytest.raises(BundleError, match=r"has no graph of clip_l that .* — name its checkpoint"):
        find_graphs(Bundle(bundle.root, other), None, StageCache(tmp_path), silent)
    with pytest.raises(BundleError, match="was not made from mini"):
        find_graphs(Bundle(bundle.root, other), ModelOptions(), cache, silent)
