"""What docs/cpp.md shows works: its project is built, and prints what the page says."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cpp_build import ROOT, built, environment, library
from sd35_ctypes import Failure, Pipe

PAGE = (ROOT / "docs" / "cpp.md").read_text("utf-8")
BLOCKS = re.findall(r"^```text\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def block(first_line: str) -> str:
    """The block of the page that begins so."""
    [text] = [text for text in BLOCKS if text.startswith(first_line)]
    return str(text)


def test_from_nothing_to_a_picture(mini_bundle: Path, tmp_path: Path) -> None:
    tree = built() / "tree"
    (tmp_path / "CMakeLists.txt").write_text(block("cmake_minimum_required"))
    (tmp_path / "draw.cpp").write_text(block("#include <fstream>"))
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "mini-cpu").symlink_to(mini_bundle)
    for line in block("cmake -S . -B build").splitlines():
        words = line.replace("/opt/sd35", str(tree)).split()
        run = subprocess.run(
            words, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout == block("step 7 of 28")
    assert (tmp_path / "heart.ppm").read_bytes().startswith(b"P6 128 128 255\n")


def test_the_errors_are_as_shown(
    mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lib = library()
    refusals = []
    with Pipe(lib, mini_bundle) as pipe:
        for wrong in ({"steps": 0}, {"size": (100, 128)}):
            with pytest.raises(Failure) as refused:
                pipe.check("a", **wrong)
            refusals.append(str(refused.value))
    with pytest.raises(Failure) as refused:
        Pipe(lib, "bundles/none")
    refusals.append(str(refused.value))
    assert "\n".join(refusals) + "\n" == block("steps must be")


def test_every_option_and_function_exists() -> None:
    cmake = "".join(p.read_text("utf-8") for p in (ROOT / "cpp").rglob("CMakeLists.txt"))
    cmake += "".join(p.read_text("utf-8") for p in (ROOT / "cpp/cmake").glob("*.cmake"))
    for option in set(re.findall(r"-D(\w+)=", PAGE)) - {
        "CMAKE_PREFIX_PATH",
        "CMAKE_INSTALL_PREFIX",
    }:
        assert option in cmake, option
    for option in re.findall(r"^\| `(\w+_\w+)` \|", PAGE, re.MULTILINE):
        assert option in cmake or option in _header(), option
    for name in re.findall(r"`(sd35_\w+|SD35_[A-Z_]+)`", PAGE):
        sources = _header() + cmake + _sources()
        assert name in sources, name


def _header() -> str:
    return (ROOT / "cpp/include/sd35/sd35.h").read_text("utf-8")


def _sources() -> str:
    return "".join(p.read_text("utf-8") for p in (ROOT / "cpp").rglob("*.cpp"))


def test_the_version_of_the_tokenizers() -> None:
    lock = (ROOT / "cpp/tokenizers/Cargo.lock").read_text("utf-8")
    [version] = re.findall(r'name = "tokenizers"\nversion = "(.*)"', lock)
    assert f"`tokenizers` in version {version}" in PAGE


def test_what_is_missing_is_as_shown(tmp_path: Path) -> None:
    """A machine without Ninja and GoogleTest."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "dirname", "sed", "cmake", "cargo"):
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    headers = tmp_path / "include" / "nlohmann"
    headers.mkdir(parents=True)
    (headers / "json.hpp").touch()
    compiler = tools / "c++"
    compiler.write_text(f"#!/bin/sh\necho ' {headers.parent}'\n")
    compiler.chmod(0o755)
    run = subprocess.run(
        [ROOT / "cpp/build.sh"], capture_output=True, text=True, check=False,
        env={"PATH": str(tools), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert run.returncode == 3
    assert run.stderr == block("libsd35 is not built")
