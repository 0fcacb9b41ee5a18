import random

import numpy as np
import pytest

from sd35_trt.mini import checker
from sd35_trt.mini.checker import ATTRIBUTES, Detection, altered, judge, judge_detections
from sd35_trt.mini.placement import draw_scene
from sd35_trt.mini.rendering import render
from sd35_trt.mini.scenes import sample
from sd35_trt.mini.world import DRAWN_SHAPES, ObjectSpec, Scene, Spec, Thing

RED_CIRCLE = ObjectSpec(("circle",), ("red",), ("small",))
STAR = ObjectSpec(("star",))


def detection(shape, colour="red", size="small", x=20.0, y=60.0):
    return Detection(shape, colour, size, x, y, 10.0)


@pytest.mark.parametrize("count", [10, pytest.param(60, marks=pytest.mark.nightly)])
def test_true_scenes_pass_and_altered_ones_do_not(count):
    shares = checker.validate(count, seed=3)
    for row in shares.values():
        assert row["true"] >= 0.98
        assert set(row) == {"true", *ATTRIBUTES}
        assert all(row[name] <= 0.03 for name in ATTRIBUTES)


def test_each_wrong_attribute_is_named():
    spec = Spec((RED_CIRCLE, STAR), ((0, "left", 1),), ("white",))
    good = [detection("circle"), detection("star", x=80.0)]
    assert judge_detections("white", good, spec).whole
    wrong = {
        "shape": [detection("ring"), good[1]],
        "colour": [detection("circle", "blue"), good[1]],
        "size": [detection("circle", size="large"), good[1]],
        "count": [*good, detection("heart", x=100.0)],
        "relation": [detection("circle", x=110.0), good[1]],
    }
    for name, objects in wrong.items():
        truths = judge_detections("white", objects, spec).statements
        assert [key for key, values in truths.items() if not all(values)] == [name]
    truths = judge_detections("black", good, spec).statements
    assert [key for key, values in truths.items() if not all(values)] == ["background"]


def test_what_a_caption_leaves_open_is_not_judged():
    verdict = judge_detections("white", [detection("star")], Spec((STAR,)))
    assert set(verdict.statements) == {"shape", "count"}


def test_missing_objects_fail_every_statement_about_them():
    verdict = judge_detections("white", [], Spec((RED_CIRCLE, STAR), ((0, "left", 1),)))
    assert not any(holds for values in verdict.statements.values() for holds in values)


def test_nearly_diagonal_is_no_relation():
    spec = Spec((RED_CIRCLE, STAR), ((0, "left", 1),))
    diagonal = [detection("circle", x=20.0, y=20.0), detection("star", x=60.0, y=61.0)]
    assert judge_detections("white", diagonal, spec).statements["relation"] == (False,)


@pytest.mark.parametrize("shape", DRAWN_SHAPES)
@pytest.mark.parametrize("radius", [9.0, 18.0])
def test_position_and_radius_are_measured(shape, radius):
    thing = Thing(shape, "green", "small", 51.3, 70.8, radius)
    background, objects = checker.find(render(Scene("gray", (thing,))))
    assert background == "gray"
    assert [o.shape for o in objects] == [shape]
    assert objects[0].x == pytest.approx(51.3, abs=0.7)
    assert objects[0].y == pytest.approx(70.8, abs=0.7)
    assert objects[0].radius == pytest.approx(radius, rel=0.06)


def test_an_empty_picture_holds_nothing():
    assert checker.find(np.full((128, 128, 3), 250, np.uint8)) == ("white", [])


def test_a_negated_colour_fails_only_for_that_colour():
    spec = Spec((ObjectSpec(("circle",), ("blue", "green")),))
    for colour, good in (("blue", True), ("green", True), ("red", False)):
        image = render(draw_scene(Spec((ObjectSpec(("circle",), (colour,)),)), random.Random(1)))
        assert judge(image, spec).whole == good


def test_altering_changes_only_what_the_caption_states():
    example = next(e for e in map(sample, range(1000)) if not e.spec.relations)
    assert altered(example.spec, "relation", random.Random(0)) is None
    with pytest.raises(ValueError, match="unknown attribute 'mood'"):
        altered(example.spec, "mood", random.Random(0))


def test_other_arrays_are_refused():
    with pytest.raises(ValueError, match="expected a uint8"):
        checker.find(np.zeros((128, 128, 3), np.float32))
