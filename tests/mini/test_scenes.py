import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd35_trt.mini import scenes
from sd35_trt.mini.scenes import SIZE, SPLITS, sample

seeds = st.integers(0, 2**31)


@settings(max_examples=60, deadline=None)
@given(seeds, st.sampled_from(SPLITS))
def test_a_seed_gives_one_example_of_its_split(seed, split):
    example = sample(seed, split)
    assert example == sample(seed, split)
    assert scenes.split_of(example.spec) == split


@settings(max_examples=100, deadline=None)
@given(seeds)
def test_the_scene_is_what_the_spec_allows(seed):
    example = sample(seed)
    things, spec = example.scene.things, example.spec
    assert example.scene.background in spec.backgrounds
    assert len(things) == len(spec.objects)
    for thing, o in zip(things, spec.objects, strict=True):
        assert thing.shape in o.shapes
        assert thing.colour in o.colours
        assert thing.size in o.sizes
        low, high = scenes.SIZES[thing.size]
        assert low <= thing.radius <= high
        assert thing.radius < thing.x < SIZE - thing.radius
        assert thing.radius < thing.y < SIZE - thing.radius
    for i, name, j in spec.relations:
        a, b = things[i], things[j]
        assert scenes.relation_holds(name, a.x, a.y, b.x, b.y)


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_objects_keep_apart(seed):
    things = sample(seed).scene.things
    for i, a in enumerate(things):
        for b in things[:i]:
            assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


def test_splits_are_disjoint_and_both_hold_every_kind_of_caption():
    specs, tags = {}, {}
    for split in SPLITS:
        examples = [sample(seed, split) for seed in range(1500)]
        specs[split] = {(e.spec.objects, e.spec.relations) for e in examples}
        tags[split] = set().union(*(e.tags for e in examples))
    assert not specs["train"] & specs["heldout"]
    kinds = {"single", "count", "pair", "trio", "relation", "negation", "nested"}
    assert tags["train"] == tags["heldout"] == kinds


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="unknown split 'test'"):
        sample(0, "test")


@pytest.mark.parametrize(
    ("words", "holds"),
    [
        ("that is not", lambda spec: any(len(o.colours) == 7 for o in spec.objects)),
        ("neither", lambda spec: any(len(o.colours) == 6 for o in spec.objects)),
        ("other than", lambda spec: any(len(o.shapes) == 7 for o in spec.objects)),
        ("any background but", lambda spec: len(spec.backgrounds) == 5),
    ],
)
def test_negations_reach_the_spec(words, holds):
    found = [e for e in map(sample, range(3000)) if words in e.caption]
    if words == "that is not":  # ... red; the same words deny a size, a shape or contrast
        found = [e for e in found if " that is not red" in e.caption and " but " not in e.caption]
    assert len(found) >= 5
    assert all(holds(e.spec) for e in found)


def test_relation_words_reach_the_spec():
    found = [e for e in map(sample, range(4000)) if e.caption.startswith(("left of", "Left of"))]
    assert len(found) >= 5
    assert {e.spec.relations for e in found} == {((0, "left", 1),)}


def test_rendering_shows_the_colours_at_the_centres():
    for seed in range(30):
        scene = sample(seed).scene
        image = scenes.render(scene)
        assert image.shape == (SIZE, SIZE, 3)
        assert tuple(image[0, 0]) == scenes.BACKGROUNDS[scene.background]
        for thing in scene.things:
            centre = image[int(thing.y), int(thing.x)]
            filled = thing.shape != "ring"
            palette = scenes.COLOURS[thing.colour] if filled else image[0, 0]
            assert tuple(centre) == tuple(palette)


def test_placing_three_large_objects_in_a_row_ends():
    large = scenes.ObjectSpec(sizes=("large",))
    spec = scenes.Spec((large,) * 3, ((0, "left", 1), (1, "left", 2)))
    for seed in range(5):
        things = scenes.draw_scene(spec, random.Random(seed)).things
        assert things[0].x < things[1].x < things[2].x


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_distances_have_slope_one_outside(shape):
    x, y = np.array([3.0, -2.5]), np.array([0.5, 2.0])
    step = 1e-4
    dx = (scenes.shape_distance(shape, x + step, y) - scenes.shape_distance(shape, x, y)) / step
    dy = (scenes.shape_distance(shape, x, y + step) - scenes.shape_distance(shape, x, y)) / step
    np.testing.assert_allclose(np.hypot(dx, dy), 1, atol=1e-3)
    assert (scenes.shape_distance(shape, x, y) > 0).all()
