"""``sd35-trt inspect`` as a user sees it."""

from __future__ import annotations

import json
from pathlib import Path


def test_inspect(run, mini_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = run("inspect", mini_bundle)
    assert status == 0
    for word in ("denoiser", "next_latents f32", "batch×16×height×width", "fp32", "guidance"):
        assert word in out
    status, out, _ = run("inspect", mini_bundle, "--json")
    assert json.loads(out) == json.loads((mini_bundle / "bundle.json").read_text())
