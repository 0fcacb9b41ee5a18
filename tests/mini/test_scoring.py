import numpy as np
import pytest

from sd35_trt.mini.contact_sheet import contact_sheet
from sd35_trt.mini.rendering import render
from sd35_trt.mini.scoring import heldout, score


@pytest.fixture(scope="module")
def examples():
    return heldout(24)


def test_true_pictures_score_all_and_far_above_chance(examples):
    result = score(np.stack([render(e.scene) for e in examples]), examples)
    assert result.whole_scene_accuracy == result.attribute_accuracy == 1
    assert result.chance_whole_scene_accuracy < 0.2
    assert 0 < result.chance_attribute_accuracy < 0.7
    assert all(share == 1 for share, _ in result.attributes.values())


def test_blank_pictures_score_nothing_but_backgrounds(examples):
    blank = np.full((len(examples), 128, 128, 3), 250, np.uint8)
    result = score(blank, examples)
    assert result.whole_scene_accuracy == 0
    assert result.attributes["shape"][0] == result.attributes["relation"][0] == 0


def test_numbers_of_pictures_and_examples_must_agree(examples):
    with pytest.raises(ValueError, match="1 images for 24 examples"):
        score(np.zeros((1, 128, 128, 3), np.uint8), examples)


def test_a_wrong_picture_is_framed_in_red():
    images = np.full((2, 128, 128, 3), 250, np.uint8)
    sheet = np.asarray(contact_sheet(images, ["good", "bad"], [True, False], columns=2))
    red = (sheet == (255, 0, 0)).all(-1)
    assert red.any()
    assert not red[:, : sheet.shape[1] // 2 - 4].any()
