import json
import math
from itertools import count
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from click.testing import CliRunner

from mini.training import run, train
from sd35_trt.mini import checkpoint_path
from sd35_trt.quality import evaluate


def invoke(*arguments):
    """Run the program without the precision that it sets: nothing sets this process back."""
    with mock.patch.object(torch, "set_float32_matmul_precision"):
        return CliRunner().invoke(train.main, [str(a) for a in arguments])


def test_training_without_data_says_how_to_make_it(tmp_path):
    result = invoke("vae", "--out", tmp_path, "--start", checkpoint_path())
    assert result.exit_code == 1
    assert "make it with: python -m mini.training.train data" in result.output


@pytest.fixture
def clock(monkeypatch):
    """Budgets in looks at the clock, of which a step takes one: as many on every machine."""
    ticks = count()
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))


@pytest.mark.nightly
@pytest.mark.usefixtures("clock")
def test_all_stages_run_are_cut_and_resume(tmp_path):
    common = ("--out", tmp_path, "--device", "cpu", "--no-compile", "--batch", 2, "--vae-batch", 2)
    result = invoke("data", *common, "--examples", 16, "--workers", 1)
    assert result.exit_code == 0, result.output
    result = invoke("vae", *common, "--vae-minutes", 0.05)
    assert result.exit_code == 0, result.output
    joint = ("joint", *common, "--joint-minutes", 0.2, "--look-at", 0)
    result = invoke(*joint, "--stop-after", 4)
    assert result.exit_code == 0, result.output

    def steps():
        rows = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
        return [row for row in rows if row["stage"] == "joint" and "flow" in row]

    first = steps()[-1]
    assert first["step"] == 4
    result = invoke(*joint)
    assert result.exit_code == 0, result.output
    last = steps()[-1]
    assert last["step"] > first["step"]
    assert last["seconds"] >= 12, "the whole budget"
    assert math.isfinite(last["flow"])
    assert last["flow"] < steps()[0]["flow"] + 0.5

    vae = json.loads((tmp_path / "vae" / "config.json").read_text())
    assert vae["scaling_factor"] != 1
    pipe = evaluate.load(tmp_path / "checkpoint")
    assert evaluate.draw(pipe, ["a red circle"], steps=1).shape == (1, 128, 128, 3)
    result = invoke("plot", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "curve.png").stat().st_size > 10_000


@pytest.mark.nightly
@pytest.mark.usefixtures("clock")
def test_training_goes_on_from_a_checkpoint(tmp_path):
    packaged = checkpoint_path()
    common = ("--out", tmp_path, "--device", "cpu", "--no-compile", "--start", packaged)
    result = invoke("all", *common, "--examples", 40, "--workers", 1, "--batch", 8, "--lr", 1e-6,
                    "--joint-minutes", 0.05, "--look-at", 0)  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"joint"}
    assert rows[0]["flow"] < 0.3
    same = (tmp_path / "checkpoint" / "vae").glob("*.safetensors")
    assert [f.read_bytes() for f in same] == [
        f.read_bytes() for f in (packaged / "vae").glob("*.safetensors")
    ]
