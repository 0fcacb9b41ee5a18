"""``sd35-trt verify`` as a user sees it."""

from __future__ import annotations

import shutil
from pathlib import Path

from conftest import one_error_line


def test_verify(run, mini_bundle: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = run("verify", mini_bundle)
    assert status == 0
    assert "all as the manifest says" in out
    copy = tmp_path / "copy"
    shutil.copytree(mini_bundle, copy)
    (copy / "t5" / "model.onnx").unlink()
    status, _, err = run("verify", copy)
    assert status == 1
    assert "t5/model.onnx is missing" in one_error_line(err)
