"""Every name of TensorRT's Python API that we use, with as many arguments as we give."""

from __future__ import annotations

import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest
from compat import tensorrt_api as api

from sd35_trt.backends import BACKENDS

# The library, as Maven Central has it, and the bindings of the same version.
_JAR = (
    "https://repo1.maven.org/maven2/org/bytedeco/tensorrt/11.2-1.5.14/"
    "tensorrt-11.2-1.5.14-linux-x86_64-redist.jar"
)
_BINDINGS = "tensorrt-cu13-bindings==11.2.1.2"
_LIBRARIES = ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11")


@pytest.mark.parametrize("name", ["tensorrt-rtx", "tensorrt"])
def test_of_the_library_that_is_installed(name: str) -> None:
    backend = BACKENDS[name]
    library = pytest.importorskip(backend.module, reason=f"{backend.title} is not installed")
    tables = [api.API, api.LATE if backend.compiles_late else api.TIMING]
    version = tuple(map(int, library.__version__.split(".")[:2]))
    if backend.compiles_late or version >= (10, 15):
        tables.append(api.NEWER)
    assert api.differences(library, *tables) == []
    crosses = hasattr(library.IBuilderConfig, "set_compute_capability")
    assert crosses == backend.crosses


@pytest.mark.nightly
def test_of_version_11(stage_cache: Path, tmp_path: Path) -> None:
    """The bindings load without a GPU. 560 MB are fetched once and kept with the tests' cache."""
    folder = stage_cache.parent / "tensorrt-11"
    folder.mkdir(exist_ok=True)
    jar = folder / "libraries.jar"
    try:
        if not jar.exists():
            part = jar.with_suffix(".part")
            urllib.request.urlretrieve(_JAR, part)
            part.rename(jar)
    except urllib.error.URLError as error:
        pytest.skip(f"Maven Central cannot be reached: {error}")
    with zipfile.ZipFile(jar) as archive:
        for entry in archive.infolist():
            if Path(entry.filename).name in _LIBRARIES:
                target = folder / Path(entry.filename).name
                if not target.exists():
                    target.write_bytes(archive.read(entry))
    bindings = tmp_path / "bindings"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(bindings)]
    subprocess.run([*pip, _BINDINGS], check=True)
    command = [sys.executable, api.__file__, str(bindings)]
    process = subprocess.run(
        [*command, *(str(folder / name) for name in _LIBRARIES)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.stdout == "11.2.1.2\n", process.stderr
