"""ControlNets on the command line: build, inspect, plan, generate; what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import one_error_line
from control_nets import write_net
from PIL import Image

from sd35_trt.checkpoints.model_options import ControlNet, Lora
from sd35_trt.cli.options import CONTROL, CONTROLNET, INTERVAL
from sd35_trt.mini import checkpoint_path

Run = Callable[..., tuple[int, str, str]]
QUICK = ("--steps", "2", "--size", "64x64", "--t5-tokens", "32")


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_net(tmp_path_factory.mktemp("nets") / "canny", checkpoint_path(), True, 1)


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path], net: Path) -> Path:
    return make_bundle(controlnets=(ControlNet("canny", str(net)),))


@pytest.fixture
def edges(tmp_path: Path) -> Path:
    path = tmp_path / "edges.png"
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[20:24] = 255
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("canny=nets/canny", ControlNet("canny", "nets/canny")),
        ("a=nets/canny:blur", ControlNet("a", "nets/canny", "blur")),
        ("a=owner/name@v1:depth", ControlNet("a", "owner/name@v1", "depth")),
        ("a=b:c", ControlNet("a", "b:c")),
        ("a=b=c", ControlNet("a", "b=c")),
        ("own=mini:canny", ControlNet("own", "mini:canny")),
        ("own=mini:canny:other", ControlNet("own", "mini:canny", "other")),
        ("own=./mini:canny", ControlNet("own", "./mini", "canny")),
    ],
)
def test_nets(text: str, expected: ControlNet) -> None:
    assert CONTROLNET.convert(text, None, None) == expected
    assert CONTROLNET.convert(expected.word, None, None) == expected


def test_pictures_and_intervals() -> None:
    expected = ("canny", Lora(Path("edges.png"), 0.7))
    assert CONTROL.convert("canny=edges.png:0.7", None, None) == expected
    assert CONTROL.convert("canny=edges.png", None, None) == ("canny", Lora(Path("edges.png")))
    assert INTERVAL.convert("canny=0:0.6", None, None) == ("canny", (0.0, 0.6))


def test_generate(bundle: Path, edges: Path, run: Run) -> None:
    words = ["generate", bundle, "a red star", *QUICK, "--json"]
    control = ["--control", f"canny={edges}:0.7", "--control-interval", "canny=0:0.5"]
    status, out, err = run(*words, *control)
    assert (status, err) == (0, "")
    parameters = json.loads(out)["parameters"]
    assert parameters["controls"] == {"canny": {"scale": 0.7, "start": 0.0, "end": 0.5}}
    with Image.open("out.png") as drawn:
        text: Any = drawn.info["sd35-trt"]
        assert json.loads(text)["controls"] == parameters["controls"]
        controlled = np.asarray(drawn)
    status, _, _ = run(*words)
    assert status == 0
    assert not np.array_equal(controlled, np.asarray(Image.open("out.png")))


def test_inspect(bundle: Path, run: Run) -> None:
    status, out, _ = run("inspect", bundle)
    assert status == 0
    assert "canny (canny)" in out
    assert "control_canny_conditioner" in out


def test_plan(net: Path, run: Run) -> None:
    words = ("plan", "--model", "mini", "--gpu", "cpu", "--policy", "half", "--json")
    status, out, _ = run(*words, "--controlnet", f"canny={net}")
    assert status == 0
    with_net = {c["name"]: c for c in json.loads(out)["components"]}
    status, out, _ = run(*words)
    without = {c["name"]: c for c in json.loads(out)["components"]}
    assert set(with_net) - set(without) == {"control_canny_conditioner", "control_canny"}
    assert with_net["control_canny"]["stage"] == "denoising"
    assert with_net["denoiser"]["weight_bytes"] == without["denoiser"]["weight_bytes"]


def test_the_build_says_what_a_net_is(net: Path, run: Run, tmp_path: Path) -> None:
    """And refuses it before any work where it is none."""
    broken = Path(shutil.copytree(net, tmp_path / "broken"))
    (broken / "diffusion_pytorch_model.safetensors").unlink()
    status, _, err = run("build", "--controlnet", f"canny={broken}", "--out", "bundle")
    assert status == 1
    assert "broken holds no .safetensors file" in one_error_line(err)
    for word, message in {
        "canny": "'canny' is not NAME=DIR",
        f"Canny={net}": "'Canny' is no name of a ControlNet",
        "canny=nowhere": "nowhere is missing",
    }.items():
        status, _, err = run("build", "--controlnet", word, "--out", "bundle")
        assert status in (1, 2)
        assert message in err
    assert not Path("bundle").exists()


def test_refused(bundle: Path, mini_bundle: Path, edges: Path, run: Run) -> None:
    given = ("--control", f"canny={edges}")
    cases: dict[str, tuple[Path, tuple[str, ...]]] = {
        "there is no ControlNet 'depth'": (bundle, ("--control", f"depth={edges}")),
        "build the bundle with: --controlnet": (mini_bundle, given),
        "--control canny has two pictures": (bundle, (*given, *given)),
        "--edges depth is of no --control": (bundle, (*given, "--edges", "depth")),
        "--control-interval depth is of no --control": (
            bundle,
            (*given, "--control-interval", "depth=0:1"),
        ),
        "let it start before it ends": (bundle, (*given, "--control-interval", "canny=1:0")),
        "nowhere.png is missing": (bundle, ("--control", "canny=nowhere.png")),
        "must be -100 to 100": (bundle, ("--control", f"canny={edges}:1000")),
    }
    for message, (path, words) in cases.items():
        status, _, err = run("generate", path, "a red star", *QUICK, *words)
        assert status == 2, message
        assert message in one_error_line(err)
