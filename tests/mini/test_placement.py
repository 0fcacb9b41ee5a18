"""Placing objects."""

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sd35_trt.mini.placement import draw_scene, relation_holds
from sd35_trt.mini.scenes import sample
from sd35_trt.mini.world import SIZE, SIZES, ObjectSpec, Spec

seeds = st.integers(0, 2**31)


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
        low, high = SIZES[thing.size]
        assert low <= thing.radius <= high
        assert thing.radius < thing.x < SIZE - thing.radius
        assert thing.radius < thing.y < SIZE - thing.radius
    for i, name, j in spec.relations:
        a, b = things[i], things[j]
        assert relation_holds(name, a.x, a.y, b.x, b.y)


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_objects_keep_apart(seed):
    things = sample(seed).scene.things
    for i, a in enumerate(things):
        for b in things[:i]:
            assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


def test_placing_three_large_objects_in_a_row_ends():
    large = ObjectSpec(sizes=("large",))
    spec = Spec((large,) * 3, ((0, "left", 1), (1, "left", 2)))
    for seed in range(5):
        things = draw_scene(spec, random.Random(seed)).things
        assert things[0].x < things[1].x < things[2].x
