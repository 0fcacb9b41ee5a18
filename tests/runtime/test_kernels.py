"""Compiled kernels are code: they load from what the user alone can have written."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bare_bundle import write_bundle

from sd35_trt.formats.bundle import Bundle, Component, Port, describe_file
from sd35_trt.runtime.kernels import KERNELS, kernel_file


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SD35_TRT_CACHE", str(tmp_path / "cache"))
    component = write_bundle(tmp_path / "bundle").components[0]
    file = kernel_file(component, "NVIDIA H100", "2.11")
    assert file is not None
    return file


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    records: list[str] = []
    logger = logging.getLogger("sd35_trt")
    monkeypatch.setattr(
        logger, "warning", lambda text, *arguments: records.append(text % arguments)
    )
    return records


def test_kept_and_read(path: Path, log: list[str]) -> None:
    assert KERNELS.read(path) == b""
    KERNELS.write(path, b"kernels")
    KERNELS.write(path, b"others")
    assert KERNELS.read(path) == b"others"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert not log


def test_without_a_home_none_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    for name in ("SD35_TRT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    component = write_bundle(tmp_path / "bundle").components[0]
    file = kernel_file(component, "NVIDIA H100", "2.11")
    assert file is None
    assert KERNELS.read(file) == b""
    KERNELS.write(file, b"kernels")
    assert "there is no home directory" in log[0]
    assert "SD35_TRT_CACHE" in log[0]


def test_the_latest_are_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = replace(KERNELS, most_files=3, most_bytes=30)
    files = [path.with_name(f"{number:032x}.bin") for number in range(6)]

    def write(number: int, size: int = 5) -> list[int]:
        few.write(files[number], bytes([number]) * size)
        for age, file in enumerate(reversed(files)):  # the clock of a file system is coarse
            if file.exists():
                os.utime(file, ns=(0, file.stat().st_mtime_ns - age))
        return [i for i, file in enumerate(files) if file.exists()]

    assert [write(number) for number in range(4)] == [[0], [0, 1], [0, 1, 2], [1, 2, 3]]
    os.utime(files[2], (1, 1))
    os.utime(files[3], (2, 2))
    os.utime(files[1], (0, 0))
    assert KERNELS.read(files[1])
    assert write(4) == [1, 3, 4], "reading counts as use"
    os.utime(files[3], (2, 2))
    os.utime(files[1], (1, 1))
    assert write(5, 24) == [4, 5], "30 bytes at most"


def _others_write_the_folder(path: Path) -> None:
    path.parent.chmod(0o777)


def _the_group_writes_the_folder(path: Path) -> None:
    path.parent.chmod(0o770)


def _others_write_the_file(path: Path) -> None:
    path.chmod(0o666)


def _the_folder_is_a_link(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))
    path.parent.symlink_to("elsewhere")


def _the_file_is_a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _the_folder_is_anothers(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    os.chown(path.parent, 12345, -1)


def _the_file_is_anothers(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    os.chown(path, 12345, -1)


@pytest.mark.parametrize(
    "change",
    [
        _others_write_the_folder, _the_group_writes_the_folder, _others_write_the_file,
        _the_folder_is_a_link, _the_file_is_a_link, _the_folder_is_anothers,
        _the_file_is_anothers,
    ],
)  # fmt: skip
def test_what_others_may_have_written_is_not_loaded(
    path: Path, log: list[str], change: Callable[[Path], None]
) -> None:
    KERNELS.write(path, b"kernels")
    change(path)
    assert KERNELS.read(path) == b""
    (line,) = log
    assert "made anew" in line
    assert "\n" not in line


def test_nothing_is_written_where_others_write(path: Path, log: list[str]) -> None:
    KERNELS.write(path, b"kernels")
    path.parent.chmod(0o777)
    KERNELS.write(path, b"others")
    assert path.read_bytes() == b"kernels"
    assert "cannot be kept" in log[-1]


@pytest.mark.parametrize("trust", [False, True])
def test_kernels_of_a_bundle_need_trust(
    path: Path, log: list[str], trust: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    from sd35_trt.runtime.sessions import inductor

    root = tmp_path / "bundle"
    (root / "denoiser" / "kernels.bin").write_bytes(b"compiled")
    files = (describe_file(root, "denoiser/kernels.bin"),)
    port = Port("x", "float32", ("batch",))
    component = Component("denoiser", "inductor", files, (port,), (port,), 1, {}, {})
    opened = Bundle.open(root, trust_kernels=trust)
    facts = SimpleNamespace(
        engine_options={"gpu": "NVIDIA H100", "mode": "default"},
        versions={"torch": torch.__version__},
    )
    bundle = SimpleNamespace(
        root=root, path=opened.path, manifest=facts, trust_kernels=opened.trust_kernels
    )
    offered: list[Any] = []
    monkeypatch.setattr(inductor, "offer_kernels", offered.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    session = object.__new__(inductor.InductorSession)
    session._queue = SimpleNamespace(device=None)  # type: ignore[assignment]
    session._component = component
    cache_file = session._offer_kernels(bundle)  # type: ignore[arg-type]
    assert offered == ([b"compiled"] if trust else [])
    assert len(log) == (not trust)
    assert trust or "--trust-kernels" in log[0]
    # What this user compiled needs none.
    KERNELS.write(cache_file, b"own")
    session._offer_kernels(bundle)  # type: ignore[arg-type]
    assert offered[-1] == b"own"
