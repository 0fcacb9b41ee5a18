"""What a build says of a model before any work."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from sd35_trt.checkpoints.look import look
from sd35_trt.checkpoints.model_options import ModelOptions
from sd35_trt.mini import checkpoint_path
from sd35_trt.planning.decide import decide
from sd35_trt.planning.description import describe
from sd35_trt.policies import load_policy
from sd35_trt.targets import find_target


def lines(name: str, guidance: bool | None = None) -> list[str]:
    target = find_target("cpu")
    return describe(
        decide(look(ModelOptions(name)), target, load_policy("fp32"), guidance=guidance)
    )


def test_mini() -> None:
    root = checkpoint_path()
    assert lines("mini") == [
        "model        mini, taken for mini: 28 steps, guidance 3, shift 3",
        f"CLIP-L       {root}/text_encoder/model.safetensors",
        f"CLIP-G       {root}/text_encoder_2/model.safetensors",
        f"T5           {root}/text_encoder_3/model.safetensors",
        f"transformer  {root}/transformer/diffusion_pytorch_model.safetensors",
        f"autoencoder  {root}/vae/diffusion_pytorch_model.safetensors",
    ]
    assert "guidance 1," in lines("mini", guidance=False)[0]


def test_turbo_without_t5(tmp_path: Path) -> None:
    model = Path(shutil.copytree(checkpoint_path(), tmp_path / "my-turbo"))
    shutil.rmtree(model / "text_encoder_3")
    index = model / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "text_encoder_3": [None, None]}))
    first, _, _, t5, *_ = lines(str(model))
    assert first.endswith("my-turbo, taken for custom: 4 steps, guidance 1, shift 3")
    assert t5.endswith("no T5: prompts are read by CLIP alone")


def test_notes() -> None:
    model = replace(look(ModelOptions()), notes=("CLIP-L has 248 positions",))
    decision = decide(model, find_target("cpu"), load_policy("fp32"))
    assert describe(decision)[-1] == "note: CLIP-L has 248 positions"
