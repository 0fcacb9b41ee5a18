"""mini's ControlNet is trained: on edges as a user's are found, from a seed, to a folder."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import SD3ControlNetModel, SD3Transformer2DModel

from mini.training import batches, control, edges
from mini.training.objective import noised
from sd35_trt.compat.opencv import canny_edges
from sd35_trt.mini import checkpoint_path, controlnet_paths, rendering, scenes, scoring
from sd35_trt.quality import evaluate


@pytest.fixture(scope="module")
def transformer():
    return SD3Transformer2DModel.from_pretrained(checkpoint_path() / "transformer")


def steep(pixels):
    """Edges without OpenCV: where the brightness changes to the right."""
    change = np.abs(np.diff(pixels.sum(2, dtype=int), axis=1, append=0)) > 60
    return np.repeat(255 * change[..., None].astype(np.uint8), 3, axis=2)


def run(out: Path, stage: str, *arguments: str) -> None:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    common = (stage, "--out", str(out), "--device", "cpu", "--threads", "1", "--workers", "1")
    try:
        result = CliRunner().invoke(control.main, [*common, *arguments], catch_exceptions=False)
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
    assert result.exit_code == 0, result.output


def test_a_new_net_changes_nothing_and_all_of_it_learns(transformer):
    torch.manual_seed(0)
    net = control.new_net(transformer)
    steered = control.Steered(transformer.requires_grad_(False), net)
    inputs = torch.randn(2, 16, 16, 16), torch.randn(2, 64, 256), torch.randn(2, 160)
    own = noised(torch.randn(2, 16, 16, 16))
    assert torch.equal(steered(own, *inputs), steered(own, *inputs, scale=0.0))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    for _ in range(3):  # what is behind a zero learns a step later
        steered(own, *inputs).backward()
        still = {n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()}
        optimizer.step()
        optimizer.zero_grad()
    # Softmax does not see what is added to every key.
    assert still <= {f"transformer_blocks.{i}.attn.to_k.bias" for i in range(control.BLOCKS)}
    assert steered(own, *inputs) < steered(own, *inputs, scale=0.0)


def test_a_net_follows_from_its_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(edges, "canny_edges", steep)
    monkeypatch.setattr(batches, "tables", lambda number, checkpoint, *_, **__: iter(
        [batches.tabulate([scenes.sample(seed) for seed in range(number)], checkpoint)]
    ))  # fmt: skip
    files = []
    for index in range(2):
        out = tmp_path / str(index)
        run(out, "all", "--examples", "12", "--steps", "3", "--batch", "4")
        files.append(out / "canny" / "diffusion_pytorch_model.safetensors")
    assert files[0].read_bytes() == files[1].read_bytes()
    net = SD3ControlNetModel.from_pretrained(files[0].parent)
    assert net.config.joint_attention_dim is None
    assert not net.config.use_pos_embed
    assert any(layer.weight.any() for layer in net.controlnet_blocks)
    rows = [json.loads(line) for line in (tmp_path / "0" / "log.jsonl").read_text().splitlines()]
    looks = [row for row in rows if "aside" in row]
    assert looks[0]["aside"] == looks[0]["without"] == looks[-1]["without"]
    assert looks[-1]["aside"] != looks[0]["aside"]


def test_training_without_data_says_how_to_make_it(tmp_path):
    arguments = ["train", "--out", str(tmp_path), "--device", "cpu"]
    result = CliRunner().invoke(control.main, arguments)
    assert result.exit_code == 1
    assert f"python -m mini.training.control data --out {tmp_path}" in result.output


KEPT = Path(__file__).with_name("edges.npz")


@pytest.fixture(scope="module")
def heldout_table():
    """Eight held-out examples with their edges."""
    table = batches.tabulate(scoring.heldout(8), checkpoint_path())
    return table | dict(np.load(KEPT))


def test_the_packaged_net_knows_where_things_stand(transformer, heldout_table):
    """By its edges, or by those of another scene, which lead astray."""
    pipe = evaluate.load(checkpoint_path())
    net = SD3ControlNetModel.from_pretrained(controlnet_paths()["canny"])
    assert dict(net.config).items() >= control.net_config(transformer).items()
    torch.manual_seed(0)
    inputs = control.encode(pipe, heldout_table, torch.device("cpu"))
    steered, rows = control.Steered(transformer, net), torch.arange(8)
    own = control.Looks(steered, inputs, rows)()
    hints = inputs.hints.roll(1, 0)
    astray = control.Looks(steered, replace(inputs, hints=hints), rows)()
    assert own["aside"] < 0.6 * own["without"]
    assert astray["aside"] > own["without"]


def test_the_kept_edges_are_opencvs(heldout_table):
    pytest.importorskip("cv2", reason="needs the extra control")
    assert np.array_equal(edges.scene_edges(heldout_table), heldout_table["edges"])


def test_edges_are_those_of_a_users_picture():
    pytest.importorskip("cv2", reason="needs the extra control")
    examples = [scenes.sample(seed) for seed in range(8)]
    own = edges.pictures_of(edges.scene_edges(batches.describe(examples)))
    exact = np.stack([canny_edges(rendering.render(e.scene)) for e in examples])
    assert own.dtype == exact.dtype == np.uint8
    assert own.shape == exact.shape
    assert exact.any((1, 2, 3)).all()
    # Scenes that are drawn in batches differ by a shade.
    assert (own != exact).mean() < 1e-3
