"""``sd35-trt policy`` as a user sees it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import one_error_line


def test_policy_show(run, mini_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = run("policy", "show", "--policy", "int8-weight")
    assert status == 0
    for word in ("transformer_blocks.N.attn.to_q", "int8-weight", "proj_out", "all"):
        assert word in out
    status, out, _ = run("policy", "show", "--policy", "fp32", "--json")
    entries = json.loads(out)
    # The same bytes as the export writes, component by component.
    manifest = json.loads((mini_bundle / "bundle.json").read_text())
    for component in manifest["components"]:
        listed = sum(e["bytes"] for e in entries if e["component"] == component["name"])
        assert listed == pytest.approx(component["weight_bytes"], rel=0.001)
    attention = Path(__file__).parents[2] / "benchmarks" / "attention-fp8.toml"
    status, out, _ = run("policy", "show", "--policy", str(attention), "--json")
    matmuls = [e for e in json.loads(out) if not e["shape"]]
    assert [(e["precision"], e["bytes"]) for e in matmuls] == [("fp8", 0)] * 6
    assert {e["rule"] for e in matmuls} == {"transformer_blocks.*.attn"}
    status, _, err = run("policy", "show", "--policy", "none")
    assert status == 2
    assert "unknown policy" in one_error_line(err)
