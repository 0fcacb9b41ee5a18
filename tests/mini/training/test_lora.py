"""LoRAs of mini are trained: from a seed, to a file that diffusers saved."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from mini.training import lora, run
from sd35_trt.checkpoints.adapter_file import AdapterFile
from sd35_trt.checkpoints.adapter_names import LayerNames, layer_shapes
from sd35_trt.checkpoints.diffusers import Checkpoint
from sd35_trt.mini import checkpoint_path, lora_paths
from sd35_trt.mini.loras import LORAS
from sd35_trt.mini.world import MOON


def trained(out: Path, name: str, steps: int = 3) -> Path:
    options = {"out": out, "examples": 8, "steps": steps, "batch": 4}
    arguments = [f"--{key}={value}" for key, value in options.items()]
    threads = torch.get_num_threads()
    try:
        result = CliRunner().invoke(lora.main, [name, *arguments], catch_exceptions=False)
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    return out / f"{name}.safetensors"


def test_a_lora_follows_from_its_seed(tmp_path):
    files = [trained(tmp_path / str(index), "moon") for index in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()
    tensors, packaged = load_file(files[0]), load_file(lora_paths()["moon"])
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in packaged.items()}
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    rows = [json.loads(line) for line in (tmp_path / "0" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 3


@pytest.mark.parametrize("name", LORAS)
def test_every_tensor_is_of_a_layer_that_the_lora_changes(name):
    checkpoint = Checkpoint(checkpoint_path())
    shapes = {
        part: layer_shapes(part, checkpoint.config(part)) for part in lora.RECIPES[name].layers
    }
    layers = AdapterFile(lora_paths()[name]).layers(LayerNames(shapes))
    assert {target.part for own in layers for target in own.layer.targets} == {*shapes}
    assert {own.scaling for own in layers} == {1.0}


def test_examples_have_plain_ones_among_them():
    own = lora.mixed_examples(LORAS["moon"], 10, 0.3)
    assert sum(MOON in e.caption for e in own) == 7
    assert len(own) == 10


def test_a_budget_in_steps_does_not_ask_the_clock(tmp_path):
    own = run.TrainingRun("own", tmp_path, torch.device("cpu"), 1.0, 10.0, 0, steps=4)
    own.spent = 5.0
    shares = []
    for own.step in range(5):
        shares.append(own.share)
        assert own.over == (own.step == 4)
    assert all(b - a == 0.25 for a, b in pairwise(shares))
