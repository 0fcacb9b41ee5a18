import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from sd35_trt.mini.rendering import render
from sd35_trt.mini.scoring import heldout
from sd35_trt.quality import evaluate


@pytest.fixture(scope="module")
def examples():
    return heldout(24)


def test_rounding_leaves_few_levels():
    layer = torch.nn.Linear(32, 32)
    before = layer.weight.detach().clone()
    evaluate.round_weights(torch.nn.Sequential(layer), 4)
    after = layer.weight.detach()
    assert 3 < len(after.unique()) <= 15
    assert (after - before).abs().max() <= before.abs().max() / 7 / 2 + 1e-6
    with pytest.raises(ValueError, match="2 is the least"):
        evaluate.round_weights(layer, 1)


def test_a_bundle_is_asked_for_every_caption(examples, monkeypatch, tmp_path):
    requests = []

    class Pipeline(nullcontext):
        @classmethod
        def load(cls, folder):
            assert folder == tmp_path
            return cls(SimpleNamespace(generate=cls.generate))

        @staticmethod
        def generate(prompts, *, seed, steps, guidance, size, adapters):
            assert adapters is None
            requests.append((prompts, seed, steps, size))
            example = next(e for e in examples if e.caption == prompts[0])
            return SimpleNamespace(images=render(example.scene)[None])

    monkeypatch.setattr(evaluate, "Pipeline", Pipeline)
    sheet = tmp_path / "sheet.png"
    arguments = ["--captions", "3", "--bundle", str(tmp_path), "--json", "--sheet", str(sheet)]
    result = CliRunner().invoke(evaluate.main, arguments, catch_exceptions=False)
    figures = json.loads(result.output)
    assert figures["whole_scene_accuracy"] == 1
    assert figures["captions"] == 3
    assert requests == [([e.caption], [i], 28, (128, 128)) for i, e in enumerate(examples[:3])]
    assert sheet.stat().st_size > 1000


def test_loras_are_drawn_from_a_bundle():
    result = CliRunner().invoke(evaluate.main, ["--lora", "night"])
    assert result.exit_code == 2
    assert "--lora needs --bundle" in result.output


def test_a_bundle_excludes_changes_to_the_weights(tmp_path):
    arguments = ["--bundle", str(tmp_path), "--weight-bits", "4"]
    result = CliRunner().invoke(evaluate.main, arguments)
    assert result.exit_code == 2
    assert "--bundle takes none of" in result.output
