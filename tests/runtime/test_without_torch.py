"""The runtime in an environment that has neither PyTorch nor anything that builds."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import psnr
from PIL import Image

from sd35_trt.runtime import Pipeline

ROOT = Path(__file__).parents[2]

_ABSENT = ["torch", "transformers", "diffusers", "onnx", "onnxscript", "modelopt"]

# What the environment holds besides the core: its installers, and the backend with its needs.
_NOT_CORE = ("pip", "setuptools", "onnxruntime", "flatbuffers", "google", "protobuf")


@pytest.fixture(scope="module")
def environment(request: pytest.FixtureRequest) -> Path:
    """A virtual environment with the core and ``[onnxruntime]`` alone.

    What it needs is kept between sessions as long as requirements and interpreter stay.
    """
    parent = Path(request.config.cache.mkdir("runtime-venv"))
    key = hashlib.sha256(f"{sys.version} {sys.prefix}".encode())
    key.update((ROOT / "pyproject.toml").read_bytes())
    folder = parent / key.hexdigest()
    # This environment's pip installs into that one, which needs none.
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    install = [*pip, "install", "-q", "--disable-pip-version-check"]
    # setuptools takes what is there for its own, modules that were removed since included.
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)
    if (folder / "complete").exists():
        subprocess.run([*install, "--force-reinstall", "--no-deps", str(ROOT)], check=True)
        return folder
    for other in parent.iterdir():
        shutil.rmtree(other)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    subprocess.run([*install, f"{ROOT}[onnxruntime]"], check=True)
    (folder / "complete").touch()
    return folder


def test_draws_the_same_picture(environment: Path, mini_bundle: Path, tmp_path: Path) -> None:
    code = f"""
import importlib.util, json, sys
assert not [name for name in {_ABSENT!r} if importlib.util.find_spec(name)]
from sd35_trt.runtime import Pipeline
with Pipeline.load({str(mini_bundle)!r}, verify=True) as pipe:
    pipe("two large green squares", seed=7, negative="red").save("picture.png")
print(json.dumps(sorted(sys.modules)))
"""
    python = environment / "bin" / "python"
    process = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "tokenizers" in json.loads(process.stdout)
    with Pipeline.load(mini_bundle) as pipe:
        here = np.asarray(pipe("two large green squares", seed=7, negative="red"))
    with Image.open(tmp_path / "picture.png") as there:
        assert psnr(np.asarray(there), here) >= 50


def test_commands_there(environment: Path, mini_bundle: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [environment / "bin" / "sd35-trt", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert run("generate", mini_bundle, "a star", "--steps", 2).returncode == 0
    assert (tmp_path / "out.png").is_file()
    assert run("inspect", mini_bundle).returncode == 0
    assert run("bench", mini_bundle, "--steps", 2, "--runs", 1).returncode == 0
    peer = run("bench", mini_bundle, "--against", "diffusers")
    assert peer.stderr == "error: --against diffusers needs torch — pip install 'sd35-trt[build]'\n"
    assert run("verify", mini_bundle).returncode == 0
    compare = run("verify", mini_bundle, "--against", mini_bundle)
    assert compare.returncode == 1
    assert (
        compare.stderr == "error: comparing bundles needs onnx — pip install 'sd35-trt[report]'\n"
    )
    findings = json.loads(run("doctor", "--json").stdout)["targets"]["cpu"]
    assert (findings["builds"], findings["runs"]) == (False, True)
    build = run("build")
    assert build.returncode == 1
    assert build.stderr == "error: building needs torch — pip install 'sd35-trt[build]'\n"


def test_the_runtime_is_small(environment: Path) -> None:
    """Without a backend, and before Python compiles it to bytecode: at most 150 MB beside what the
    packaged ControlNet has."""
    (packages,) = environment.glob("lib/python*/site-packages")
    total = sum(
        path.stat().st_size
        for path in packages.rglob("*")
        if path.is_file()
        and path.suffix != ".pyc"
        and not path.relative_to(packages).parts[0].startswith(_NOT_CORE)
        and "controlnets" not in path.parts
    )
    assert total <= 150e6
