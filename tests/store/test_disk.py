"""Errors of files, in one line that names what failed."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sd35_trt.errors import Sd35Error
from sd35_trt.progress import silent
from sd35_trt.store.cache import StageCache
from sd35_trt.store.disk import CACHE, file_errors, written_in
from sd35_trt.store.stages import Stage, run_stage


def test_a_full_disk(tmp_path: Path) -> None:
    out = tmp_path / "not" / "there"
    with pytest.raises(Sd35Error) as caught, file_errors(out, "look"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as write(2): it names no file
    message = str(caught.value)
    assert message.startswith(f"cannot write {out}: No space left on device (")
    assert message.endswith(" GB free there) — free space, or look")


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with (
        pytest.raises(Sd35Error, match=r"cannot use .*/gone: No such file or directory — look"),
        file_errors(tmp_path / "out", "look"),
    ):
        (tmp_path / "gone").read_bytes()


def test_which_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the places that hold the file, the innermost: each has its own way out."""
    cache, out = tmp_path / "tmp" / "cache", tmp_path / "bundles" / "mini"
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "tmp"))
    for path, words in (
        (
            cache / "t5" / "a",
            r"t5/a, in the cache: .* — free space with sd35-trt cache prune, or choose another --c",
        ),
        (tmp_path / "tmp" / "a", r"a, in the folder for temporary files: .* TMPDIR"),
        (
            out.parent / ".mini.building-1" / "a",
            r"a: No space left on device \(.* — free space, or make room",
        ),
    ):
        with (
            pytest.raises(Sd35Error, match=f"cannot write .*{words}"),
            file_errors(out, "make room", {cache: CACHE}),
        ):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_writers_that_name_no_file(tmp_path: Path) -> None:
    """A limit on sizes of files stands for a full disk."""
    tensors = {"a": torch.zeros(10_000)}
    writers: list[Callable[[Path], object]] = [
        lambda path: path.write_bytes(bytes(40_000)),
        lambda path: save_file(tensors, path),
    ]
    cache = StageCache(tmp_path / "cache")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for write in writers:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            with (
                pytest.raises(Sd35Error) as caught,
                file_errors(tmp_path / "out", "make room", {cache.root: CACHE}),
                cache.create("t5", "0" * 64) as work,
            ):
                write(work / "file")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert f"cannot write {work}" in str(caught.value)
        assert "in the cache: File too large" in str(caught.value)
        assert not list(tmp_path.glob("cache/t5/*"))


def test_what_may_not_be_written(tmp_path: Path) -> None:
    with (
        pytest.raises(Sd35Error, match=r"cannot use .*: Read-only .* — make it writable, or look"),
        file_errors(tmp_path / "out", "look"),
    ):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path / "a"))


def test_errors_of_another_kind_stay(tmp_path: Path) -> None:
    with pytest.raises(KeyError), written_in(tmp_path):
        raise KeyError("a")
    with pytest.raises(FileNotFoundError), written_in(tmp_path):
        (tmp_path / "gone").read_bytes()


def test_a_finished_stage_is_used_where_nothing_can_be_written(tmp_path: Path) -> None:
    runs = []

    def run(out: Path, progress: object) -> None:
        runs.append(out)
        (out / "model").write_bytes(b"1")

    stage, root = Stage("t5", {"a": 1}, (), run), tmp_path / "cache"
    folder = run_stage(StageCache(root), stage, silent)
    shutil.rmtree(root / "hashes")
    (root / "hashes").write_bytes(b"")  # no folder can be made there
    assert run_stage(StageCache(root), stage, silent) == folder
    assert len(runs) == 1
