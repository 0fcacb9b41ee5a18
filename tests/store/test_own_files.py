"""Files of the user's own: two that write one do not mix."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from sd35_trt.store import own_files


def test_two_processes_of_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in two containers, where each is the first."""
    path, warnings = tmp_path / "kernels" / "0.bin", []
    real = os.replace

    def meanwhile(*arguments: Any, **options: Any) -> None:
        monkeypatch.setattr(os, "replace", real)
        own_files.write_own(path, b"second", "kernels")
        assert path.read_bytes() == b"second"
        real(*arguments, **options)

    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr(os, "replace", meanwhile)
    monkeypatch.setattr(own_files.logger, "warning", lambda *words: warnings.append(words))
    own_files.write_own(path, b"first", "kernels")
    assert path.read_bytes() == b"first"
    assert not warnings
    assert [file.name for file in path.parent.iterdir()] == ["0.bin"]
