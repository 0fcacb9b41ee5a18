"""Whether a picture follows a scene's outlines, whatever its colours."""

from dataclasses import replace

import pytest

from sd35_trt.mini import outlines
from sd35_trt.mini.checker import find
from sd35_trt.mini.loras import at_night
from sd35_trt.mini.rendering import render
from sd35_trt.mini.scenes import sample
from sd35_trt.mini.world import SHAPES, Scene, Thing


@pytest.mark.parametrize("seed", range(6))
def test_colours_are_no_outlines(seed):
    example = sample(seed, "heldout")
    assert follows(render(example.scene), example.scene)
    assert follows(render(at_night(example).scene), example.scene)


def follows(image, scene):
    return outlines.follows(find(image)[1], scene)


STAR = Thing("star", "red", "large", 40.0, 50.0, 16.0)
RING = Thing("ring", "blue", "small", 90.0, 90.0, 10.0)


@pytest.mark.parametrize(
    "things",
    [
        (replace(STAR, x=45.0), RING),
        (replace(STAR, radius=13.0), RING),
        (STAR, replace(RING, shape="circle")),
        (STAR,),
        (STAR, RING, replace(RING, y=30.0)),
        (replace(STAR, shape="ring"), replace(RING, shape="star")),
    ],
    ids=["elsewhere", "smaller", "another shape", "one too few", "one too many", "exchanged"],
)
def test_what_does_not_follow(things):
    scene = Scene("white", (STAR, RING))
    assert follows(render(scene), scene)
    assert not follows(render(Scene("white", things)), scene)


def test_every_shape_is_told_from_others():
    for shape in SHAPES:
        scene = Scene("black", (replace(STAR, shape=shape),))
        told = [
            o for o in SHAPES if follows(render(Scene("black", (replace(STAR, shape=o),))), scene)
        ]
        assert told == [shape]
