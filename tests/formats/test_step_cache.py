"""The step cache's file: what it holds, what is refused, and which bundles take it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bare_bundle import write_bundle
from msgspec.structs import replace

from sd35_trt.errors import BundleError, UsageError
from sd35_trt.formats.bundle import Bundle, describe_file, write_manifest
from sd35_trt.formats.step_cache import STEP_CACHE, StepCache, StepPlan, read_step_cache

FILES = {"transformer/config.json": "0" * 64}

PLAN = StepPlan(
    steps=5,
    sampler="euler",
    shift=3.0,
    coefficients=(None, None, (2.0, -1.0), None, (1.0, 0.0)),
    error=0.01,
)
CACHE = StepCache(short_blocks=2, blocks=8, files=FILES, plans=(PLAN,))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """With short steps of two blocks."""
    root = tmp_path / "bundle"
    manifest = write_bundle(root)
    write_manifest(root, replace(manifest, requires=("step-cache",), short_steps=2))
    return root


def test_it_comes_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / STEP_CACHE
    path.write_bytes(CACHE.encode())
    assert read_step_cache(path) == CACHE
    assert CACHE.plan(5, "euler", 3.0) == PLAN
    assert CACHE.plan(5, "euler", 1.0) is None
    assert PLAN.short == 2
    assert PLAN.evaluations(2, 8) == 3 * 8 + 2 * 2


WRONG: dict[str, dict[str, Any]] = {
    "4 coefficients for 5 steps": {"coefficients": [None] * 4},
    "the first 2 steps are full": {"coefficients": [None, [1, 0], None, None, None]},
    "coefficients are finite": {"coefficients": [None, None, None, None, [1e30, 0]]},
    "Expected `array` of length 2": {"coefficients": [None, None, None, None, [1, 0, 0]]},
    "shift 0.0 is not above 0": {"shift": 0.0},
    "error -1.0 is none": {"error": -1.0},
    "cannot be read": {"error": float("nan")},
    "Expected `int` <= 1000": {"steps": 1001},
}


@pytest.mark.parametrize("reason", WRONG)
def test_hostile_plans_are_refused_in_one_line(reason: str, tmp_path: Path) -> None:
    data = json.loads(CACHE.encode())
    data["plans"][0] |= WRONG[reason]
    path = tmp_path / STEP_CACHE
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match=reason) as caught:
        read_step_cache(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"short_blocks": 8}, "8 of 8 blocks are no short step"),
        ({"plans": 2}, "two plans for 5 steps of euler with shift 3"),
        ({"format": 2}, "format 2"),
    ],
)
def test_a_hostile_file_is_refused(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    data = json.loads(CACHE.encode())
    if "plans" in change:
        change = {"plans": data["plans"] * 2}
    path = tmp_path / STEP_CACHE
    path.write_text(json.dumps({**data, **change}))
    with pytest.raises(UsageError, match=reason):
        read_step_cache(path)


def give(root: Path, cache: StepCache) -> None:
    """Put it into a bundle as a file of its manifest."""
    (root / STEP_CACHE).write_bytes(cache.encode())
    manifest = Bundle.open(root).manifest
    files = (*manifest.files, describe_file(root, STEP_CACHE))
    write_manifest(root, replace(manifest, files=files))


def test_a_bundles_own_is_read(bundle: Path) -> None:
    assert StepCache.of(Bundle.open(bundle)) is None
    give(bundle, CACHE)
    assert StepCache.of(Bundle.open(bundle, verify=True)) == CACHE


@pytest.mark.parametrize(
    ("cache", "reason"),
    [
        (replace(CACHE, short_blocks=3), "short steps of 3 blocks, the bundle's have 2"),
        (replace(CACHE, files={"transformer/config.json": "1" * 64}), "another transformer"),
    ],
)
def test_anothers_is_refused(cache: StepCache, reason: str, bundle: Path) -> None:
    with pytest.raises(UsageError, match=reason):
        cache.check(Bundle.open(bundle).manifest, STEP_CACHE)
    give(bundle, cache)
    with pytest.raises(BundleError, match=reason):
        StepCache.of(Bundle.open(bundle))


def test_a_bundle_without_short_steps_takes_none(tmp_path: Path) -> None:
    manifest = write_bundle(tmp_path / "plain")
    with pytest.raises(UsageError, match="no short steps — build it with: --short-steps 2"):
        CACHE.check(manifest, STEP_CACHE)
