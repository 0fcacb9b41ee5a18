"""``sd35-trt build`` as a user sees it."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import one_error_line


def test_wrong_use_of_build(run) -> None:  # type: ignore[no-untyped-def]
    cases: list[tuple[list[object], int, str]] = [
        (["--gpu", "voodoo"], 2, "known: cpu, turing"),
        (["--model", "./none"], 1, "is missing"),
        (["--model", "none/"], 1, "is missing"),
        (["--policy", "fp7"], 2, "unknown policy"),
        (["--batch", "4:1"], 2, "--batch 4:1"),
        (["--size", "big"], 2, "is not MIN:MAX"),
    ]
    for arguments, expected, words in cases:
        status, out, err = run("build", *arguments)
        assert (status, out) == (expected, ""), arguments
        assert words in one_error_line(err)
    assert not list(Path().iterdir())
    status, _, err = run("nonsense")
    assert status == 2
    assert "No such command" in one_error_line(err)


def test_build_reports_json(run, stage_cache: Path, mini_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = run("build", "--cache-dir", stage_cache, "--json")
    assert status == 0
    data = json.loads(out)
    assert data["bundle"] == "bundles/mini-cpu"
    assert data["bytes"] > 1e6
    manifest = json.loads(Path("bundles/mini-cpu/bundle.json").read_text())
    assert manifest["command"].startswith("sd35-trt build")


def test_build_says_what_it_took_the_model_for(  # type: ignore[no-untyped-def]
    run, stage_cache: Path, mini_bundle: Path
) -> None:
    status, out, err = run("build", "--cache-dir", stage_cache)
    assert status == 0
    assert out.startswith("bundles/mini-cpu")
    assert err.startswith("model        mini, taken for mini: 28 steps, guidance 3, shift 3\n")
