"""What mini draws with its LoRAs as inputs of a bundle, judged by the scenes' checker."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from sd35_trt.mini.loras import LORAS, examples
from sd35_trt.mini.scoring import Score, score
from sd35_trt.quality.evaluate import draw_from_bundle

MIXES = (["night"], ["moon"], ["moon", "night"])


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path]) -> Path:
    """Mini in FP32, with adapters."""
    return make_bundle(adapters=32)


def judged(
    bundle: Path, captions_of: Sequence[str], drawn_with: Sequence[str], count: int
) -> Score:
    """The score of held-out captions of some LoRAs, drawn with some."""
    shown = examples([LORAS[name] for name in captions_of], count, "heldout")
    texts = [e.caption for e in shown]
    return score(draw_from_bundle(bundle, texts, steps=14, loras=drawn_with), shown)


@pytest.mark.parametrize("loras", MIXES[-1:], ids="+".join)
def test_loras_draw_what_they_were_trained_for(bundle: Path, loras: list[str]) -> None:
    right = judged(bundle, loras, loras, 3)
    without = judged(bundle, loras, [], 3)
    assert right.attribute_accuracy >= 0.8
    assert right.attribute_accuracy >= without.attribute_accuracy + 0.1


@pytest.mark.nightly
@pytest.mark.parametrize(("loras", "least"), [*zip(MIXES, (0.85, 0.5, 0.4), strict=True)])
def test_scenes_are_right_as_a_whole(bundle: Path, loras: list[str], least: float) -> None:
    assert judged(bundle, loras, loras, 60).whole_scene_accuracy >= least


@pytest.mark.nightly
def test_captions_without_the_new_word_are_still_drawn(bundle: Path) -> None:
    assert judged(bundle, [], ["moon"], 40).whole_scene_accuracy >= 0.7
