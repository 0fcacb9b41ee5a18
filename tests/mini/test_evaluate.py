import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from sd35_trt.mini import evaluate
from sd35_trt.mini.scenes import render


@pytest.fixture(scope="module")
def examples():
    return evaluate.heldout(24)


def test_true_pictures_score_all_and_far_above_chance(examples):
    result = evaluate.score(np.stack([render(e.scene) for e in examples]), examples)
    assert result.whole_scene_accuracy == result.attribute_accuracy == 1
    assert result.chance_whole_scene_accuracy < 0.2
    assert 0 < result.chance_attribute_accuracy < 0.7
    assert all(share == 1 for share, _ in result.attributes.values())


def test_blank_pictures_score_nothing_but_backgrounds(examples):
    blank = np.full((len(examples), 128, 128, 3), 250, np.uint8)
    result = evaluate.score(blank, examples)
    assert result.whole_scene_accuracy == 0
    assert result.attributes["shape"][0] == result.attributes["relation"][0] == 0


def test_numbers_of_pictures_and_examples_must_agree(examples):
    with pytest.raises(ValueError, match="1 images for 24 examples"):
        evaluate.score(np.zeros((1, 128, 128, 3), np.uint8), examples)


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
    asked = []

    class Pipeline:
        @classmethod
        def load(cls, folder):
            assert folder == tmp_path
            return cls()

        def generate(self, prompts, *, seed, steps, guidance, size):
            asked.append((prompts, seed, steps, size))
            example = next(e for e in examples if e.caption == prompts[0])
            return SimpleNamespace(images=render(example.scene)[None])

    runtime = ModuleType("sd35_trt.runtime")
    vars(runtime)["Pipeline"] = Pipeline
    monkeypatch.setitem(sys.modules, "sd35_trt.runtime", runtime)
    sheet = tmp_path / "sheet.png"
    arguments = ["--captions", "3", "--bundle", str(tmp_path), "--json", "--sheet", str(sheet)]
    result = CliRunner().invoke(evaluate.main, arguments, catch_exceptions=False)
    figures = json.loads(result.output)
    assert figures["whole_scene_accuracy"] == 1
    assert figures["captions"] == 3
    assert asked == [([e.caption], [i], 28, (128, 128)) for i, e in enumerate(examples[:3])]
    assert sheet.stat().st_size > 1000


def test_a_wrong_picture_is_framed_in_red():
    images = np.full((2, 128, 128, 3), 250, np.uint8)
    sheet = np.asarray(evaluate.contact_sheet(images, ["good", "bad"], [True, False], columns=2))
    red = (sheet == (255, 0, 0)).all(-1)
    assert red.any()
    assert not red[:, : sheet.shape[1] // 2 - 4].any()


def test_a_bundle_excludes_changes_to_the_weights(tmp_path):
    arguments = ["--bundle", str(tmp_path), "--weight-bits", "4"]
    result = CliRunner().invoke(evaluate.main, arguments)
    assert result.exit_code == 2
    assert "--bundle takes none of" in result.output
