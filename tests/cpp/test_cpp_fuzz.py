"""libFuzzer on what libsd35 and its server read from others."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from bare_bundle import to_format_1, write_bundle
from cpp_build import ROOT, run_command, run_program
from PIL import Image

# Each; ten minutes found nothing.
_SECONDS = 60

_REQUEST = {
    "prompt": "a \ud800 star", "n": 2, "size": "64x128", "response_format": "b64_json",
    "negative_prompt": "x", "seed": 5, "steps": 3, "shift": 3.0, "guidance": 4.5,
    "sampler": "euler", "t5_tokens": 77, "model": "m", "user": "u",
    "prompt_2": "b", "prompt_3": "c", "negative_prompt_2": "", "negative_prompt_3": "d",
    "weighting": True, "adapters": {"style": 0.5}, "skip_guidance_layers": [1, 2],
    "skip_layer_guidance_scale": 2.0, "control": {"canny": {"image": "", "scale": 0.5, "end": 0.9}},
}  # fmt: skip


@pytest.fixture(scope="module")
def programs() -> Path:
    if shutil.which("clang++-14") is None:
        pytest.skip("clang-14 is not installed")
    run_command("cmake", "--preset", "fuzz", folder=ROOT / "cpp")
    run_command("cmake", "--build", "--preset", "fuzz", "-j", "2", folder=ROOT / "cpp")
    return ROOT / "build" / "cpp" / "fuzz" / "tests" / "fuzz"


def fuzz(program: Path, folder: Path, seeds: list[bytes]) -> None:
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)
    run_program(program, f"-max_total_time={_SECONDS}", "-timeout=25", "-max_len=20000",
                f"-artifact_prefix={folder}/", corpus)  # fmt: skip


@pytest.mark.nightly
def test_the_manifest(programs: Path, mini_bundle: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "bare")
    seeds = [(root / "bundle.json").read_bytes() for root in (mini_bundle, tmp_path / "bare")]
    to_format_1(tmp_path / "bare")
    seeds.append((tmp_path / "bare" / "bundle.json").read_bytes())
    fuzz(programs / "manifest_fuzz", tmp_path, seeds)


@pytest.mark.nightly
def test_the_servers_requests(programs: Path, tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGBA", (8, 8)).save(picture, format="PNG")
    form = b"prompt=a\nn=2\nstrength=0.5\npaste=true\ncontrol={}\n" + picture.getvalue()
    fuzz(programs / "request_fuzz", tmp_path, [json.dumps(_REQUEST).encode(), form])
