"""``sd35-trt gpus`` as a user sees it."""

from __future__ import annotations

import json

from sd35_trt.policies import builtin_policies
from sd35_trt.targets import targets


def test_gpus(run) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = run("gpus")
    assert status == 0
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert set(targets()) <= set(rows)
    assert "sm89" in rows["rtx4090"]
    assert "24 GiB  1,008 GB/s" in rows["rtx4090"]
    status, out, _ = run("gpus", "--json")
    listed = {row["name"]: row for row in json.loads(out)}
    assert set(listed) == set(targets())
    assert listed["rtx4060"]["memory_bytes"] == 8 * 2**30
    assert listed["t4"]["policies"] == ["int8-weight", "fp32", "half"]
    assert set(listed["ada"]["policies"]) == set(builtin_policies())
