"""Timings of kernels: kept, added to by builds at once, and worth nothing where they do not fit."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sd35_trt.engines import timing_cache as module
from sd35_trt.engines.timing_cache import timing_cache


class FakeCache:
    """TensorRT's ``ITimingCache``: names of kernels, one a line behind the library's mark."""

    def __init__(self, data: bytes) -> None:
        mark, *names = data.split(b"\n")
        self.fits = mark in (b"", b"here")
        self.names = set(names) if mark == b"here" else set()

    def combine(self, other: FakeCache, ignore_mismatch: bool) -> bool:
        self.names |= other.names
        return True

    def serialize(self) -> bytes:
        return b"\n".join([b"here", *sorted(self.names)])


class FakeConfig:
    """As much of ``IBuilderConfig`` as there is to timings."""

    cache: FakeCache

    def create_timing_cache(self, data: bytes) -> FakeCache:
        return FakeCache(data)

    def set_timing_cache(self, cache: FakeCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.fits:
            self.cache = cache
        return cache.fits

    def get_timing_cache(self) -> FakeCache:
        return self.cache

    def compile(self, *names: bytes) -> set[bytes]:
        """The kernels that were measured."""
        additions = set(names) - self.cache.names
        self.cache.names |= additions
        return additions


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(module, "_gpu", lambda: ("NVIDIA H100 80GB HBM3", "12080"))
    return SimpleNamespace(__name__="tensorrt", __version__="10.6.0")


def _measured(trt: Any, folder: Path, *names: bytes) -> set[bytes]:
    config = FakeConfig()
    with timing_cache(trt, config, folder):
        return config.compile(*names)


def test_what_was_measured_is_not_measured_again(trt: Any, tmp_path: Path) -> None:
    folder = tmp_path / "timings"
    assert _measured(trt, folder, b"a", b"b") == {b"a", b"b"}
    assert _measured(trt, folder, b"b", b"c") == {b"c"}
    assert _measured(trt, folder, b"a", b"b", b"c") == set()
    assert [p.name for p in folder.iterdir()] == [
        "tensorrt-10.6.0-nvidia-h100-80gb-hbm3-12080.timings"
    ]


def test_each_library_gpu_and_driver_has_its_own(
    trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _measured(trt, tmp_path, b"a")
    trt.__version__ = "10.7.0"
    assert _measured(trt, tmp_path, b"a") == {b"a"}
    monkeypatch.setattr(module, "_gpu", lambda: ("NVIDIA A100", "12080"))
    assert _measured(trt, tmp_path, b"a") == {b"a"}
    assert len(list(tmp_path.iterdir())) == 3


def test_builds_at_once_lose_nothing(trt: Any, tmp_path: Path) -> None:
    barrier = threading.Barrier(4)

    def build(name: bytes) -> None:
        config = FakeConfig()
        with timing_cache(trt, config, tmp_path):
            config.compile(name)
            barrier.wait()  # all have read the file, none has written it

    threads = [threading.Thread(target=build, args=(name,)) for name in (b"a", b"b", b"c", b"d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _measured(trt, tmp_path, b"a", b"b", b"c", b"d") == set()


def test_a_failed_build_leaves_the_file_as_it_was(trt: Any, tmp_path: Path) -> None:
    _measured(trt, tmp_path, b"a")
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()

    def fail() -> None:
        config = FakeConfig()
        with timing_cache(trt, config, tmp_path):
            config.compile(b"b")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [before]


@pytest.mark.parametrize("content", [b"garbage", b"elsewhere\na", b""])
def test_a_file_that_does_not_fit_is_as_good_as_none(
    trt: Any, tmp_path: Path, content: bytes
) -> None:
    _measured(trt, tmp_path, b"a")
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    assert _measured(trt, tmp_path, b"a") == {b"a"}
    assert _measured(trt, tmp_path, b"a") == set()


def test_what_others_can_write_is_not_read(trt: Any, tmp_path: Path) -> None:
    folder = tmp_path / "timings"
    _measured(trt, folder, b"a")
    folder.chmod(0o777)
    assert _measured(trt, folder, b"a") == {b"a"}


def test_nothing_is_kept_where_no_folder_is_given(trt: Any, tmp_path: Path) -> None:
    config = FakeConfig()
    with timing_cache(trt, config, None):
        assert not hasattr(config, "cache")


def test_timings_that_cannot_be_kept_fail_no_build(trt: Any, tmp_path: Path) -> None:
    """The folder's name is taken by a file."""
    (tmp_path / "timings").write_bytes(b"mine")
    assert _measured(trt, tmp_path / "timings", b"a") == {b"a"}
    assert _measured(trt, tmp_path / "timings" / "below", b"a") == {b"a"}
    assert (tmp_path / "timings").read_bytes() == b"mine"
