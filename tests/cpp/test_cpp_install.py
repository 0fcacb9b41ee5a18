"""An installed libsd35: examples are built from it, and it is as small and closed as it says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from cpp_build import ROOT, built, environment, examples, run_program
from PIL import Image

from sd35_trt.runtime import Pipeline

PROMPT = "a large pink heart on a navy background"

# Of docs/cpp.md.
_MOST_BYTES = 6_000_000


@pytest.fixture(scope="module")
def expected(mini_bundle: Path) -> np.ndarray:
    with Pipeline.load(mini_bundle) as pipe:
        return pipe.generate(PROMPT, seed=7).images[0]


@pytest.mark.parametrize("program", ["draw_c", "draw_cpp"])
def test_the_examples_draw(
    program: str, mini_bundle: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    picture = tmp_path / "picture.ppm"
    with picture.open("wb") as out:
        run = subprocess.run(
            [examples() / program, mini_bundle, PROMPT], stdout=out, stderr=subprocess.PIPE,
            env=environment(), check=False,
        )  # fmt: skip
    assert run.returncode == 0, run.stderr
    np.testing.assert_array_equal(np.asarray(Image.open(picture)), expected)


@pytest.mark.parametrize("program", ["draw_c", "draw_cpp"])
def test_the_examples_fail_in_one_line(program: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [examples() / program, tmp_path, "a"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stderr == (
        f"{tmp_path} is not a bundle (no bundle.json) — make one with: sd35-trt build\n"
    )


def test_pkg_config_knows_it(tmp_path: Path) -> None:
    if shutil.which("pkg-config") is None:
        pytest.skip("pkg-config is not installed")
    tree = built() / "tree"
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "sd35"], capture_output=True, text=True, check=True,
        env={**environment(), "PKG_CONFIG_PATH": str(next(tree.rglob("pkgconfig")))},
    ).stdout.split()  # fmt: skip
    program = tmp_path / "draw"
    source = ROOT / "cpp/examples/draw.c"
    subprocess.run(["cc", source, "-o", program, *flags], check=True)
    assert program.exists()


def test_the_library_is_small_and_exports_its_functions_alone() -> None:
    library = built() / "tree" / "lib" / "libsd35.so"
    assert library.resolve().stat().st_size <= _MOST_BYTES
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout
    exported = {line.split()[-1].partition("@")[0] for line in listed.splitlines()}
    header = (ROOT / "cpp/include/sd35/sd35.h").read_text("utf-8")
    declared = set(re.findall(r"^SD35_API [^(;]*?(sd35_\w+)\(", header, re.MULTILINE))
    assert exported == declared
    needed = subprocess.run(
        ["readelf", "-d", library], capture_output=True, text=True, check=True
    ).stdout
    assert re.findall(r"SONAME.*\[(.*)\]", needed) == ["libsd35.so.0"]
    # The system's alone: backends are opened when they are needed.
    libraries = set(re.findall(r"NEEDED.*\[(.*?)\.so", needed))
    assert libraries <= {"libstdc++", "libm", "libgcc_s", "libc", "ld-linux-x86-64",
                         "ld-linux-aarch64"}, libraries  # fmt: skip


def test_the_header_is_plain_c(tmp_path: Path) -> None:
    source = tmp_path / "empty.c"
    source.write_text("#include <sd35/sd35.h>\nint main(void) { return 0; }\n")
    subprocess.run(
        ["cc", "-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only",
         f"-I{ROOT / 'cpp/include'}", source],
        check=True,
    )  # fmt: skip


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "dirname", "sed", "c++"):
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    run = subprocess.run(
        [ROOT / "cpp/build.sh"], capture_output=True, text=True, check=False,
        env={"PATH": str(tools), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert run.returncode == 3
    assert "it needs: cmake ninja-build cargo" in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert sysconfig.get_platform().startswith("linux")


def test_an_old_onnxruntime_is_refused(mini_bundle: Path, tmp_path: Path) -> None:
    """A stand-in that says its version."""
    source = tmp_path / "old.c"
    source.write_text(
        'static const char *version(void) { return "1.24.1"; }\n'
        "static const void *api(unsigned wanted) { (void)wanted; return 0; }\n"
        "struct base { const void *(*api)(unsigned); const char *(*version)(void); };\n"
        "static const struct base base = {api, version};\n"
        "const struct base *OrtGetApiBase(void) { return &base; }\n"
    )
    library = tmp_path / "libonnxruntime.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library], check=True)

    def draw(named: object) -> str:
        run = subprocess.run(
            [examples() / "draw_c", mini_bundle, "a"], capture_output=True, text=True, check=False,
            env={**environment(), "SD35_ONNXRUNTIME": str(named)},
        )  # fmt: skip
        assert run.returncode == 1
        assert len(run.stderr.splitlines()) == 1
        return run.stderr

    words = "ONNX Runtime 1.24.1 is too old: it reads files that a model names from anywhere — "
    assert draw(library).startswith(words)
    assert "does not load" in draw(tmp_path / "nothing.so")
    assert "is no ONNX Runtime" in draw(built() / "libsd35.so")
    assert "no absolute path" in draw("libonnxruntime.so.1")


def test_the_sources_are_formatted() -> None:
    formatter = shutil.which("clang-format-14")
    if formatter is None:
        pytest.skip("clang-format-14 is not installed")
    sources = [p for kind in ("*.cpp", "*.hpp") for p in (ROOT / "cpp").rglob(kind)]
    assert len(sources) > 50
    subprocess.run([formatter, "--dry-run", "-Werror", *sources], check=True)


def test_units_are_all_run() -> None:
    listed = run_program(built() / "tests" / "units", "--gtest_list_tests")
    sources = "".join(p.read_text("utf-8") for p in (ROOT / "cpp/tests/units").glob("*.cpp"))
    assert len(re.findall(r"^  \w", listed, re.MULTILINE)) == len(
        re.findall(r"^TEST\(", sources, re.MULTILINE)
    )
