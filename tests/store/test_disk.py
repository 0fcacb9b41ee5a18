"""Errors of files, in one line that names what failed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from sd35_trt.errors import Sd35Error
from sd35_trt.store.disk import file_errors


def test_a_full_disk(tmp_path: Path) -> None:
    out = tmp_path / "not" / "there"
    with pytest.raises(Sd35Error) as caught, file_errors(out, "free space"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as write(2): it names no file
    message = str(caught.value)
    assert message.startswith(f"cannot write {out}: No space left on device (")
    assert message.endswith(" GB free there) — free space")


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with (
        pytest.raises(Sd35Error, match=r"cannot use .*/gone: No such file or directory — look"),
        file_errors(tmp_path / "out", "look"),
    ):
        (tmp_path / "gone").read_bytes()
