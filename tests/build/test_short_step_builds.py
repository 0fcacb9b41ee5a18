"""What a build with short steps refuses before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sd35_trt.build import BuildOptions, build
from sd35_trt.errors import UsageError
from sd35_trt.formats.step_cache import STEP_CACHE, StepCache


def refused(tmp_path: Path, reason: str, **options: Any) -> None:
    out, stages = tmp_path / "bundle", tmp_path / "stages"
    with pytest.raises(UsageError, match=reason):
        build(BuildOptions(out=out, cache_dir=stages, **options))
    assert not out.exists()
    # Hashes of the checkpoint's files may be noted there; nothing is traced.
    assert not list(stages.glob("*-graph"))


def step_cache(folder: Path, short_blocks: int = 2) -> Path:
    """Of a model that is none."""
    files = {"transformer/config.json": "0" * 64}
    cache = StepCache(short_blocks=short_blocks, blocks=6, files=files, plans=())
    path = folder / STEP_CACHE
    path.write_bytes(cache.encode())
    return path


@pytest.mark.parametrize(
    ("count", "reason"),
    [
        (0, "--short-steps 0 computes nothing — use 1 or more"),
        (-1, "--short-steps -1 computes nothing"),
        (6, "a full step of this model computes 6 blocks — use less, .* --short-steps 1"),
        (7, "a full step of this model computes 6 blocks"),
    ],
)
def test_blocks_that_are_no_part_of_the_model(count: int, reason: str, tmp_path: Path) -> None:
    refused(tmp_path, reason, short_steps=count)


def test_two_numbers_of_blocks(tmp_path: Path) -> None:
    reason = "--short-steps 3, and the step cache is of short steps of 2 blocks"
    refused(tmp_path, reason, short_steps=3, step_cache=step_cache(tmp_path))


def test_a_step_cache_of_another_model(tmp_path: Path) -> None:
    refused(tmp_path, "calibrated for another transformer", step_cache=step_cache(tmp_path))


def test_a_step_cache_that_is_none(tmp_path: Path) -> None:
    refused(tmp_path, "cannot be read", step_cache=tmp_path / "nothing.json")
